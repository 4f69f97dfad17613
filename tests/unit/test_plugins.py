"""Plugins are found by name; a wrong name says what there is."""

import pytest

from dagkit import plugins
from dagkit.concept import PluginOptions
from dagkit.errors import PluginError


def test_near_names_are_suggested():
    with pytest.raises(PluginError, match=r"'dmeo' is not a judge\. Did you mean 'demo'\? Available: .*demo"):
        plugins.load("judges", "dmeo")


@pytest.mark.parametrize("kind", list(plugins.BUILTIN))
def test_every_builtin_imports(kind: plugins.Kind):
    assert plugins.names(kind), f"no {kind}"
    for name in plugins.BUILTIN[kind]:
        assert callable(plugins.load(kind, name)) or plugins.load(kind, name)


def test_plugin_that_does_not_import_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(plugins.BUILTIN["judges"], "broken", "dagkit.judges.nowhere:Judge")

    with pytest.raises(PluginError, match=r"judge 'broken' \(dagkit\.judges\.nowhere:Judge\) does not import"):
        plugins.load("judges", "broken")


@pytest.mark.parametrize("kind", ["proposers", "segmenters", "judges"])
def test_every_plugin_tells_its_options(kind: plugins.Kind):
    """So that `dagkit concept show` can refuse others."""
    for name in plugins.names(kind):
        schema = plugins.load(kind, name).Options
        assert issubclass(schema, PluginOptions)
        assert schema.model_config["extra"] == "forbid"
        assert all(field.description for field in schema.model_fields.values()), name
