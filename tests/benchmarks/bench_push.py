"""Pushing tasks with pre-masks against bare SDK calls that send the same, to one server, in turns. Prints one JSON
object.

    python tests/benchmarks/bench_push.py [--num-tasks 5000] [--turns 5]

Both upload the same images (50 a request) and import the same predictions (100 a request). dagkit's share includes
what the bare calls are spared: encoding and checking masks, looking for what is there, writing down ids. The server's
CPU time is that of its process during each turn.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
from label_studio_sdk import LabelStudio
from PIL import Image
from scipy.ndimage import gaussian_filter

from dagkit.concept import load_concept
from dagkit.labelstudio import tasks
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.config import labelling_config
from dagkit.labelstudio.server import EmbeddedServer
from dagkit.workspace import StageFolder

SIZE = 256
BATCH = tasks.DEFAULT_BATCH_SIZE


def images_and_masks(num: int) -> tuple[list[bytes], list[np.ndarray]]:
    """A few different ones, used over and over: their making is not timed."""
    rng = np.random.default_rng(0)
    images, masks = [], []
    for _ in range(min(num, 16)):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIZE // 8, SIZE // 8, 3), np.uint8)).resize((SIZE, SIZE)).save(
            buffer, "PNG"
        )
        images.append(buffer.getvalue())
        masks.append(gaussian_filter(rng.standard_normal((SIZE, SIZE)), 8) > 0.05)
    return images, masks


def server_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-tasks", type=int, default=5000)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    per_turn = options.num_tasks // options.turns
    images, masks = images_and_masks(per_turn)
    page = labelling_config(load_concept("weapon"))
    seconds: Counter[str] = Counter()

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        server = EmbeddedServer(folder=Path(temporary))
        stack.callback(server.down)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        login = server.up(port)
        pid = server.pid
        assert pid is not None
        client = stack.enter_context(Client(login.url, login.token))
        sdk = LabelStudio(base_url=login.url, api_key=login.token)
        ours = client.create_project("ours", page, "", 1)
        theirs = client.create_project("theirs", page, "", 1)
        folder = StageFolder(Path(temporary) / "labeling")

        def make(key: str) -> tasks.Task:
            index = int(key) % len(images)
            proposed = tasks.prediction({"weapon": masks[index]}, {"weapon": 0.5}, model_version="sam@1")
            return tasks.Task(key, images[index] + key.encode(), SIZE, SIZE, (proposed,))

        def note(ids: dict[str, int]) -> None:
            for key in ids.keys() - noted:
                folder.append({"key": key, "task_id": ids[key]})
                noted.add(key)

        noted: set[str] = set()

        def push_ours(first: int) -> None:
            tasks.push(client, ours, page, [f"{i:06d}" for i in range(first + per_turn)], make, note)

        def push_bare(first: int) -> None:
            http = httpx.Client(base_url=login.url, headers=sdk._client_wrapper.get_headers(), timeout=60)  # no upload
            for start in range(first, first + per_turn, BATCH):
                batch = prepared[start - first : start - first + BATCH]
                places: list[str] = []
                for half in range(0, len(batch), 50):
                    files = [
                        (f"f{i}", (f"{t.key}.png", t.image, "image/png")) for i, t in enumerate(batch[half : half + 50])
                    ]
                    path = f"/api/projects/{theirs}/import"
                    ids = http.post(path, params={"commit_to_project": "false"}, files=files).json()
                    query = {"ids": json.dumps(ids["file_upload_ids"])}
                    rows = http.get(f"/api/projects/{theirs}/file-uploads", params=query).json()
                    places += ["/data/" + row["file"] for row in rows]
                bodies = [
                    {"data": {"image": place, "key": task.key}, "predictions": list(task.predictions)}
                    for place, task in zip(places, batch, strict=True)
                ]
                sdk.projects.import_tasks(id=theirs, request=bodies, return_task_ids=True)

        def timed(name: str, body: Callable[[int], None], first: int) -> None:
            wall, cpu, of_server = time.monotonic(), time.process_time(), server_seconds(pid)
            body(first)
            seconds[f"{name}.wall"] += time.monotonic() - wall
            seconds[f"{name}.client_cpu"] += time.process_time() - cpu
            seconds[f"{name}.server_cpu"] += server_seconds(pid) - of_server

        for turn in range(options.turns):
            first = turn * per_turn
            prepared = [make(f"{i:06d}") for i in range(first, first + per_turn)]
            order = [("dagkit", push_ours), ("sdk", push_bare)]
            for name, body in order if turn % 2 == 0 else order[::-1]:
                timed(name, body, first)
        counts = [client.project(project)["task_number"] for project in (ours, theirs)]
        assert counts == [per_turn * options.turns] * 2, counts

    cpu = {name: seconds[f"{name}.client_cpu"] + seconds[f"{name}.server_cpu"] for name in ("dagkit", "sdk")}
    print(
        json.dumps(
            {
                "push.wall_ratio": round(seconds["dagkit.wall"] / seconds["sdk.wall"], 3),
                "push.cpu_ratio": round(cpu["dagkit"] / cpu["sdk"], 3),
                "push.seconds": {name: round(value, 2) for name, value in sorted(seconds.items())},
                "push.num_tasks": per_turn * options.turns,
                "push.num_turns": options.turns,
            }
        )
    )


if __name__ == "__main__":
    main()
