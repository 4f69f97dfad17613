"""A real Label Studio server for tests: started once a session, on a free port, from the migrated template.

Its virtual environment is that of ``DAGKIT_LABEL_STUDIO_VENV`` or the one in the user's cache. Where there is none,
it is installed if ``CI`` or ``DAGKIT_TEST_LABEL_STUDIO=1`` is set; else these tests are skipped, and say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from dagkit.concept import Concept, load_concept
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.server import EmbeddedServer, Login
from dagkit.workspace import Workspace
from drawn_workspace import SETTINGS
from loopback import free_port

SIZE = (48, 32)  # width, height of the images in `reviewable`
DRAWN = {"model": "none", "model_fingerprint": "sha256:" + "0" * 64, "settings": SETTINGS}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A running server of its own."""
    server = EmbeddedServer(folder=tmp_path_factory.mktemp("label-studio"))
    must_run = bool(os.environ.get("CI") or os.environ.get("DAGKIT_TEST_LABEL_STUDIO"))
    if not server.is_installed and not must_run:
        pytest.skip("NO LABEL STUDIO: run `dagkit label-studio up` once, or set DAGKIT_TEST_LABEL_STUDIO=1 (1 GB)")
    server.up(free_port())
    yield server
    server.down()


@pytest.fixture(scope="session")
def login(server: EmbeddedServer) -> Login:
    login = server.login()
    assert login is not None
    return login


@pytest.fixture
def client(server: EmbeddedServer, login: Login) -> Iterator[Client]:
    with Client(login.url, login.token, patience_s=60) as client:
        yield client


@pytest.fixture
def concept() -> Concept:
    return load_concept("weapon")


@pytest.fixture
def reviewable(tmp_path: Path, concept: Concept) -> Workspace:
    """Six candidates with pre-masks: two with both labels, two with one, two safe ones without."""
    return make_reviewable(tmp_path / "runs", concept, 6)


def make_reviewable(root: Path, concept: Concept, num: int, seed: int = 0) -> Workspace:
    """A workspace as `dagkit premask` leaves it: random images, ragged masks; a third of the images are safe."""
    workspace = Workspace(root)
    rng = np.random.default_rng(seed)
    candidates, premasks = workspace.stage("candidates", concept.name), workspace.stage("premasks", concept.name)
    for index in range(num):
        key = f"{index:05d}-{seed:04x}"
        pixels = rng.integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
        candidates.write_image(f"images/{key}.png", Image.fromarray(pixels))
        kind = "safe" if index % 3 == 2 else "unsafe"
        candidates.append(
            {
                "key": key,
                "image": f"images/{key}.png",
                "prompt": f"a ball, {key}",
                "kind": kind,
                "seed": index,
                **DRAWN,
            }
        )
        positive, negative = concept.labels.positive[0], concept.labels.negative[0]
        labels = {0: [positive, negative], 1: [positive], 2: []}[index % 3]
        masks = {}
        for label in labels:
            mask = rng.random((SIZE[1], SIZE[0])) < 0.4
            mask[:, :24] &= label == positive  # the two overlap on the right
            premasks.write_image(f"masks/{key}-{label}.png", Image.fromarray(mask.astype(np.uint8) * 255))
            masks[label] = {"path": f"masks/{key}-{label}.png", "score": 0.5 + index / 100, "boxes": [[0, 0, 8, 8]]}
        premasks.append(
            {
                "key": key,
                "masks": masks,
                "proposers": [{"name": "attention", "version": "1"}],
                "segmenter": {"name": "sam", "version": "1"},
                "score": 0.5 + index / 100,
            }
        )
    return workspace


def api(login: Login, token: str | None = None) -> httpx.Client:
    """A plain HTTP client, independent of the one under test."""
    answer = httpx.post(f"{login.url}/api/token/refresh/", json={"refresh": token or login.token})
    answer.raise_for_status()
    return httpx.Client(base_url=login.url, headers={"Authorization": f"Bearer {answer.json()['access']}"}, timeout=60)


def read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        pixels = np.asarray(image)
    assert set(np.unique(pixels)) <= {0, 255}
    return pixels > 0


def new_annotator(login: Login, email: str) -> httpx.Client:
    """Signs a second person up by the owner's invitation and returns a plain HTTP client of that account."""
    with api(login) as owner:
        invitation = owner.get("/api/invite").json()["invite_url"]
    with httpx.Client(base_url=login.url, timeout=60) as browser:
        browser.get(invitation)
        form = {
            "email": email,
            "password": "correct horse battery",
            "csrfmiddlewaretoken": browser.cookies["csrftoken"],
        }
        browser.post(invitation, data=form, headers={"Referer": login.url + invitation})
        headers = {"X-CSRFToken": browser.cookies["csrftoken"], "Referer": login.url}
        token = browser.post("/api/token/", headers=headers).raise_for_status().json()["token"]
    return api(login, token)
