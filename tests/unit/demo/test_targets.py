"""The commands that made the bundled data write over nothing that is somebody's."""

from pathlib import Path

from click.testing import CliRunner

from dagkit.demo import atlas, measure, train


def test_a_folder_or_file_that_is_somebodys_is_refused(tmp_path: Path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "sprites.png").write_text("mine")
    for line in ((train.main, ["judge"]), (atlas.main, ["--font", __file__])):
        result = CliRunner().invoke(line[0], [*line[1], "--out", str(tmp_path)])
        assert result.exit_code == 1
        assert "dagkit did not make this folder, and it holds sprites.png, vae" in result.output
        assert "Use another --out" in result.output
    result = CliRunner().invoke(measure.main, ["--sheet", str(tmp_path / "sprites.png")])
    assert (result.exit_code, "there is such a file already" in result.output) == (1, True)
    assert (tmp_path / "sprites.png").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sprites.png", "vae"]
