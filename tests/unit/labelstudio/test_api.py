"""What the client asks for, and what it makes of the answers."""

from __future__ import annotations

from dagkit.labelstudio.api import Client
from loopback import Answer, answer, site

LEGACY = "0123456789abcdef0123456789abcdef01234567"


def test_pages_are_followed_to_the_last_and_not_beyond() -> None:
    asked: list[str] = []

    def respond(method: str, path: str, headers: dict[str, str]) -> Answer:
        asked.append(path)
        page = 1 if "page=1&" in path else 2
        tasks = [{"id": 2 * page + i, "data": {"key": f"k{2 * page + i}"} if i else {}} for i in range(2)]
        return answer(200, {"tasks": tasks, "total": 4})

    with site(respond) as url, Client(url, LEGACY) as client:
        assert client.task_ids(7) == {"k3": [3], "k5": [5]}
    assert len(asked) == 2
    assert all("project=7&fields=task_only" in path for path in asked)
