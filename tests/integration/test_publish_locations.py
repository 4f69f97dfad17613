"""Folder, bucket (a real S3 server: moto) and Hub (its own client against a loopback server) keep the same promises."""

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from published_places import BucketPlace, HubPlace, Place
from s3fs import S3FileSystem

from dagkit import registry
from dagkit.errors import PublishError, TokenError, WorkspaceError
from dagkit.registry.index import INDEX_FILE, PAGE_FILE
from dagkit.registry.locations.bucket import Bucket
from dagkit.stages import publish as stage
from dagkit.workspace import Workspace
from loopback_hub import LoopbackHub, Repository
from small_tokens import is_equal, save_small_token, small_token

pytestmark = pytest.mark.usefixtures("cache")


def publish(place: Place, root: Path, version: str, seed: int = 0, examples: tuple[Path, ...] = ()) -> registry.Entry:
    folder = root / "weapon" / version
    if not folder.exists():
        save_small_token(root, version, seed=seed)
    return registry.publish(registry.pack(folder, examples=examples), registry.open_location(place.url))


def test_published_versions_are_found_by_url(place: Place, tmp_path: Path):
    for number, version in enumerate(["1.0.0", "1.1.0", "2.0.0"]):
        publish(place, tmp_path / "tokens", version, seed=number)

    for wanted, version, seed in [
        ("@1.0.0", "1.0.0", 0),
        ("@^1", "1.1.0", 1),
        ("@latest", "2.0.0", 2),
        ("", "2.0.0", 2),
    ]:
        token = registry.load_token(place.url + wanted)
        assert is_equal(token, small_token(version, seed=seed))
        assert registry.resolve(place.url + wanted).version == version
    with pytest.raises(TokenError, match=r"has no version 1.0.1. Did you mean '1.0.0'.*Available: 1.0.0, 1.1.0, 2.0.0"):
        registry.load_token(f"{place.url}@1.0.1")
    assert registry.check(registry.open_location(place.url))[1] == {}


def test_a_published_version_never_changes(place: Place, tmp_path: Path):
    publish(place, tmp_path / "one", "1.0.0")
    before = place.files()

    with pytest.raises(PublishError, match=r"has weapon@1.0.0 already, with other content. A published version never"):
        publish(place, tmp_path / "other", "1.0.0", seed=1)
    assert place.files() == before
    same = registry.pack(tmp_path / "one" / "weapon" / "1.0.0")
    assert registry.published(same, registry.open_location(place.url).read_index())


def test_publishing_again_brings_back_what_is_missing_or_damaged(place: Place, tmp_path: Path):
    for number, version in enumerate(["1.0.0", "1.1.0"]):
        publish(place, tmp_path, version, seed=number)
    parcel = registry.pack(tmp_path / "weapon" / "1.1.0")
    location = registry.open_location(place.url)
    entry = location.read_index().entry("1.1.0")
    assert registry.damaged_files(location, entry) == []
    names = [sorted(name for name in place.files() if name.endswith(end))[-1] for end in ("token.json", "README.md")]
    place.remove(names[0])
    place.write(names[1], b"changed")

    assert sorted(registry.damaged_files(location, entry)) == ["README.md", "token.json"]
    with pytest.raises((TokenError, PublishError)):
        registry.load_token(f"{place.url}@1.1.0")
    with pytest.raises(PublishError, match=r"has weapon@1.1.0 already, with other content"):
        publish(place, tmp_path / "other", "1.1.0", seed=7)
    again = registry.publish(parcel, location)

    assert (again.content, again.published) == (entry.content, entry.published)
    assert is_equal(registry.load_token(f"{place.url}@1.1.0"), small_token("1.1.0", seed=1))
    assert "1.1.0" not in registry.check(location)[1]
    before = place.files()
    assert registry.publish(parcel, location) == again
    assert place.files() == before


def test_places_that_are_somebody_elses_are_left_alone(place: Place, hub: LoopbackHub, tmp_path: Path):
    name = "INDEX.md" if isinstance(place, BucketPlace) else "weights.bin"
    if isinstance(place, HubPlace):
        hub.repositories[place.name] = Repository(is_private=True)
        hub.repositories[place.name].commit({"README.md": b"theirs", name: b"theirs"})
    else:
        (tmp_path / "published").mkdir()
        place.write(name, b"theirs")
    before = place.files()
    for is_dry_run in (True, False):
        with pytest.raises(
            PublishError, match=f"is not empty, and dagkit has published nothing there: it holds {name}."
        ):
            stage.run(
                Workspace(tmp_path),
                str(save_small_token(tmp_path / str(is_dry_run))),
                place.url,
                is_dry_run=is_dry_run,
                is_unmeasured_allowed=True,
            )
    assert place.files() == before


def test_one_location_one_concept(place: Place, tmp_path: Path):
    publish(place, tmp_path, "1.0.0")
    other = registry.pack(save_small_token(tmp_path, "1.1.0", concept="violence"))

    with pytest.raises(PublishError, match=r"holds tokens of 'weapon', but got one of 'violence'"):
        registry.publish(other, registry.open_location(place.url))


def test_index_page_names_every_version(place: Place, tmp_path: Path):
    entries = [publish(place, tmp_path, version) for version in ("1.0.0", "1.1.0")]

    page = place.files()[PAGE_FILE].decode()
    assert page.startswith("# weapon: 2 published versions\n")
    assert page.index("| 1.1.0 |") < page.index("| 1.0.0 |")
    assert all(f"`{entry.content[7:19]}`" in page for entry in entries)
    assert f'load_token("{place.url}@1.1.0")' in page
    assert [one["version"] for one in json.loads(place.files()[INDEX_FILE])["versions"]] == ["1.0.0", "1.1.0"]
    place.write(PAGE_FILE, b"stale")
    location = registry.open_location(place.url)
    location.write_page(location.read_index())
    assert place.files()[PAGE_FILE].decode() == page


def test_one_changed_byte_anywhere_is_refused(place: Place, tmp_path: Path, cache: Path):
    publish(place, tmp_path, "1.0.0")
    names = [name for name in place.files() if name not in (PAGE_FILE, ".gitattributes")]
    assert len(names) == 5

    for number, name in enumerate(names):
        whole = place.files()[name]
        position = len(whole) * (number + 1) // (len(names) + 1)
        place.write(name, whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises((TokenError, PublishError), match=r"changed|damaged|not JSON|schema"):
            registry.load_token(f"{place.url}@^1")
        place.write(name, whole[:-1])
        with pytest.raises((TokenError, PublishError), match=r"changed|damaged|not JSON|schema"):
            registry.load_token(f"{place.url}@^1")
        place.write(name, whole)
        assert not list(cache.glob("tokens/*"))
    assert registry.load_token(f"{place.url}@^1").name == "weapon@1.0.0"


def test_check_names_the_damaged_version(place: Place, tmp_path: Path):
    publish(place, tmp_path, "1.0.0", seed=0)
    publish(place, tmp_path, "1.1.0", seed=1)
    name = next(name for name in place.files() if name.endswith("token.json"))
    newest = sorted(name for name in place.files() if name.endswith("token.json"))[-1]
    place.write(newest, b" " * len(place.files()[name]))

    problems = registry.check(registry.open_location(place.url))[1]
    assert "1.1.0" in problems
    assert "token.json was changed after it was published" in problems["1.1.0"]


def test_longer_files_are_not_read_to_their_end(place: Place, tmp_path: Path):
    publish(place, tmp_path, "1.0.0")
    name = next(name for name in place.files() if name.endswith("README.md"))
    place.write(name, place.files()[name] + b"x" * 1_000_000)

    with pytest.raises((TokenError, PublishError), match=r"was changed after it was published|Do not use it"):
        registry.load_token(place.url)


def test_examples_leave_only_when_named_and_without_metadata(place: Place, tmp_path: Path):
    secret = PngInfo()
    secret.add_text("prompt", "the prompt of this image")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "private name.png", pnginfo=secret)
    folder = save_small_token(tmp_path, "1.0.0")
    (folder / "candidate.png").write_bytes((tmp_path / "private name.png").read_bytes())
    publish(place, tmp_path, "1.0.0")
    assert not [name for name in place.files() if name.endswith(".png")]

    publish(place, tmp_path, "1.1.0", examples=(tmp_path / "private name.png",))
    images = {name: data for name, data in place.files().items() if name.endswith(".png")}
    assert [name.split("/")[-2:] for name in images] == [["examples", "01.png"]]
    assert all(b"prompt" not in data and data.startswith(b"\x89PNG") for data in images.values())
    assert registry.load_token(place.url).version == "1.1.0"


def dying(number: int, writes: tuple[tuple[object, str], ...], action: Callable[[], object]) -> bool:
    """Does something in a forked process that is killed (SIGKILL) at one of its writes; whether it came that far."""
    child = os.fork()
    if child == 0:
        count = 0

        def wrap(original: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **named)

            return call

        for owner, name in writes:
            setattr(owner, name, wrap(getattr(owner, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_anywhere_it_is_complete_or_absent(place: Place, tmp_path: Path):
    publish(place, tmp_path, "1.0.0")
    save_small_token(tmp_path, "1.1.0", seed=1)
    states = []
    for number in range(1, 30):
        was_killed = dying(number, place.writes, lambda: publish(place, tmp_path, "1.1.0"))
        token = registry.load_token(f"{place.url}@^1")
        assert is_equal(token, small_token("1.0.0")) or is_equal(token, small_token("1.1.0", seed=1))
        states.append((was_killed, token.version))
        if token.version == "1.1.0":
            break

    assert len(states) >= 3
    assert {version for _, version in states[:-1]} == {"1.0.0"}
    assert all(was_killed for was_killed, _ in states[:-1])
    publish(place, tmp_path, "1.2.0", seed=2)
    assert registry.check(registry.open_location(place.url))[1] == {}
    assert not list(tmp_path.rglob("*.part"))


def test_two_publishers_at_once(bucket: BucketPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish(bucket, tmp_path / "a", "1.0.0")
    put = Bucket._put
    others: list[str] = []

    def slow_put(location: Bucket, key: str, data: bytes) -> None:
        if not others:
            others.append(key)
            publish(bucket, tmp_path / "b", "1.1.0", seed=7)
        put(location, key, data)

    monkeypatch.setattr(Bucket, "_put", slow_put)
    with pytest.raises(
        PublishError, match=r"somebody else published there at the same time. Run the same command again"
    ):
        publish(bucket, tmp_path / "a", "1.1.0", seed=1)
    assert is_equal(registry.load_token(f"{bucket.url}@1.1.0"), small_token("1.1.0", seed=7))


def meanwhile(monkeypatch: pytest.MonkeyPatch, writes: tuple[tuple[object, str], ...], number: int, action: object):
    """Does something once, from inside the ``number``-th of the writes of what follows."""
    count = 0

    def wrap(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                action()
            return original(*arguments, **named)

        return call

    for owner, name in writes:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


@pytest.mark.parametrize(("where", "number"), [("bucket", 1), ("bucket", 5), ("hub", 1), ("hub", 2), ("hub", 3)])
def test_two_publishers_of_equal_content_both_succeed(
    request: pytest.FixtureRequest, tmp_path: Path, where: str, number: int, monkeypatch: pytest.MonkeyPatch
):
    """The other one begins and ends inside one of the first one's writes: files, tag, index."""
    place = HubPlace(request.getfixturevalue(where)) if where == "hub" else request.getfixturevalue(where)
    publish(place, tmp_path, "1.0.0")
    save_small_token(tmp_path, "1.1.0", seed=1)
    entries = []
    with monkeypatch.context() as patched:
        meanwhile(patched, place.writes, number, lambda: entries.append(publish(place, tmp_path, "1.1.0")))
        entries.append(publish(place, tmp_path, "1.1.0"))

    assert [entry.content for entry in entries] == [entries[0].content] * 2
    assert is_equal(registry.load_token(f"{place.url}@1.1.0"), small_token("1.1.0", seed=1))
    assert registry.check(registry.open_location(place.url))[1] == {}


def test_two_publishers_of_equal_content_in_one_folder(tmp_path: Path):
    parcel = registry.pack(save_small_token(tmp_path, "1.0.0"))
    location = registry.open_location(f"file://{tmp_path}/published")
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(lambda _: registry.publish(parcel, location), range(4)))
    assert [entry.published for entry in entries] == [entries[0].published] * 4
    assert registry.check(location)[1] == {}


def test_records_that_name_local_paths_are_not_published(tmp_path: Path):
    model = small_token().record.base_model.model_copy(update={"id": "/home/alice/models/sd15"})
    folder = small_token(base_model=model).save(tmp_path / "weapon" / "1.0.0")
    with pytest.raises(PublishError, match=r"weapon@1.0.0 was not published: its token.json names a place") as refused:
        registry.pack(folder)
    assert "dagkit optimize" in str(refused.value)


def test_hub_moves_on_while_publishing(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = HubPlace(hub)
    publish(place, tmp_path, "1.0.0")
    original = HfApi.create_commit

    def late(self: HfApi, *arguments: object, **named: object) -> object:
        repository = hub.repositories[place.name]
        repository.commit({**repository.commits[repository.refs["main"]], "notes.txt": b"from another"})
        return original(self, *arguments, **named)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(PublishError, match=r"HTTP 412 .*Somebody else published there at the same time"):
        publish(place, tmp_path, "1.1.0")
    assert registry.load_token(place.url).version == "1.0.0"


def test_hub_repositories_are_private_and_tagged(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = HubPlace(hub)
    entry = publish(place, tmp_path, "1.0.0")

    repository = hub.repositories[place.name]
    assert repository.is_private
    assert repository.refs["v1.0.0"] == entry.revision
    assert set(registry.pack(tmp_path / "weapon" / "1.0.0").files) <= set(repository.commits[entry.revision])
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(PublishError, match=r"no token is published there, or you may not see it"):
        registry.load_token(f"{place.url}@1.0.0")
    with pytest.raises(PublishError, match=r"hf auth login") as refused:
        publish(place, tmp_path, "1.1.0")
    assert "hf_of_somebody_else" not in str(refused.value)


def test_public_repositories_only_when_asked(hub: LoopbackHub, tmp_path: Path):
    parcel = registry.pack(save_small_token(tmp_path, "1.0.0"))
    registry.publish(parcel, registry.open_location("hf://acme/open", is_public=True))
    assert not hub.repositories["acme/open"].is_private

    parcel = registry.pack(save_small_token(tmp_path, "1.1.0"))
    with pytest.raises(PublishError, match=r"hf://acme/open is public. Add --public"):
        registry.publish(parcel, registry.open_location("hf://acme/open"))


@pytest.mark.parametrize("step", ["POST .*/commit/", "POST .*/tag/", "PUT /lfs", "POST .*/preupload/"])
def test_hub_that_fails_half_way(hub: LoopbackHub, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch):
    place = HubPlace(hub)
    publish(place, tmp_path, "1.0.0")
    hub.broken = step

    with pytest.raises(PublishError, match=r"hf://acme/weapon cannot be written: .*507 .*no space left"):
        publish(place, tmp_path, "1.1.0", seed=1)
    assert registry.load_token(place.url).version == "1.0.0"
    hub.broken = None
    assert publish(place, tmp_path, "1.1.0").revision == hub.repositories[place.name].refs["v1.1.0"]
    assert is_equal(registry.load_token(place.url), small_token("1.1.0", seed=1))


def test_examples_of_an_older_version_do_not_stay_on_main(hub: LoopbackHub, tmp_path: Path):
    place = HubPlace(hub)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    publish(place, tmp_path, "1.0.0", examples=(tmp_path / "a.png",))
    publish(place, tmp_path, "1.1.0")

    assert "examples/01.png" not in place.files()
    assert registry.check(registry.open_location(place.url))[1] == {}  # the older version still has it, at its commit


def test_pinned_versions_need_no_network(bucket: BucketPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish(bucket, tmp_path, "1.0.0")
    registry.load_token(f"{bucket.url}@^1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()  # as in a new process

    assert registry.load_token(f"{bucket.url}@1.0.0").name == "weapon@1.0.0"
    with pytest.raises(PublishError, match=r"cannot be read.*Check the network, AWS_ENDPOINT_URL") as failed:
        registry.load_token(f"{bucket.url}@^1")
    assert "secret-that-must-not-be-shown" not in str(failed.value)


def test_a_damaged_cache_is_fetched_again(bucket: BucketPlace, tmp_path: Path, cache: Path):
    publish(bucket, tmp_path, "1.0.0")
    path = registry.resolve(f"{bucket.url}@1.0.0").path
    assert path.is_relative_to(cache)
    (path / "token.json").write_bytes(b"{}")

    assert registry.load_token(f"{bucket.url}@1.0.0").name == "weapon@1.0.0"
    (path / "guideline.safetensors").unlink()
    for pin in cache.glob("pins/*/*.json"):
        pin.write_bytes(b"{")
    assert registry.load_token(f"{bucket.url}@1.0.0").name == "weapon@1.0.0"
    assert [folder.name for folder in (cache / "tokens").iterdir()] == [path.name]


@pytest.mark.parametrize("what", ["tokens/*/token.json", "pins/*/*.json"])
def test_a_cache_with_pipes_and_folders_in_it_is_fetched_again(
    bucket: BucketPlace, tmp_path: Path, cache: Path, what: str
):
    publish(bucket, tmp_path, "1.0.0")
    for put in (os.mkfifo, os.mkdir):
        registry.load_token(f"{bucket.url}@1.0.0")
        [path] = cache.glob(what)
        path.unlink()
        put(path)
        if what.startswith("pins") and put is os.mkdir:
            with pytest.raises(
                (PublishError, WorkspaceError), match=r"1.0.0.json: .*folder stands where a file is needed"
            ):
                registry.load_token(f"{bucket.url}@1.0.0")
        else:
            assert registry.load_token(f"{bucket.url}@1.0.0").name == "weapon@1.0.0"


def test_a_version_that_was_replaced_behind_the_index_is_refused(bucket: BucketPlace, tmp_path: Path, cache: Path):
    publish(bucket, tmp_path / "old", "1.0.0")
    registry.load_token(f"{bucket.url}@^1")
    bucket.s3.delete_object(Bucket=bucket.bucket, Key=f"team/weapon/{INDEX_FILE}")
    publish(bucket, tmp_path / "new", "1.0.0", seed=1)

    with pytest.raises(
        TokenError, match=r"other content than when it was first fetched.*delete .*1.0.0.json"
    ) as refused:
        registry.load_token(f"{bucket.url}@^1")
    Path(str(refused.value).rpartition("delete ")[2].rstrip(".")).with_suffix(".json").unlink()
    assert is_equal(registry.load_token(f"{bucket.url}@^1"), small_token("1.0.0", seed=1))


def test_missing_places(bucket: BucketPlace, tmp_path: Path):
    with pytest.raises(PublishError, match=r"no token is published there, or you may not see it: it has no index.json"):
        registry.load_token(f"{bucket.url}@^1")
    with pytest.raises(PublishError, match=r"no token is published there"):
        registry.load_token(f"file://{tmp_path}/nowhere@^1")
    parcel = registry.pack(save_small_token(tmp_path, "1.0.0"))
    with pytest.raises(PublishError, match=r"s3://no-such-bucket/x: there is no such bucket"):
        registry.publish(parcel, registry.open_location("s3://no-such-bucket/x"))
