"use strict";
(() => {
  const table = document.querySelector("table.prompts");
  if (!table) return;
  const kind = document.getElementById("filter-kind");
  const outcome = document.getElementById("filter-outcome");
  const text = document.getElementById("filter-text");
  const count = document.getElementById("filter-count");
  const rows = [...table.tBodies[0].rows];
  const apply = () => {
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const visible =
        (!kind.value || row.dataset.kind === kind.value) &&
        (!outcome.value || row.dataset.outcomes.split(" ").includes(outcome.value)) &&
        (!wanted || row.dataset.text.includes(wanted));
      row.hidden = !visible;
      shown += visible;
    }
    count.textContent = `${shown} of ${rows.length} prompts`;
  };
  for (const control of [kind, outcome, text]) control.addEventListener("input", apply);
  apply();
})();
