"""How many trials run side by side, and what Ray keeps free for each, by what the nodes have."""

import pytest

from vae_hyperband import cluster, packers
from vae_hyperband.packers import Packers, Started
from vae_hyperband.search_config import SearchOptions


@pytest.fixture
def nodes(monkeypatch):
    """``nodes([{"CPU": 4}, ...])`` are those that Ray knows; a dead one has no resources."""

    def make(resources):
        found = [
            {"NodeID": f"node {n}", "Alive": bool(one), "Resources": one or {"CPU": 99.0}}
            for n, one in enumerate(resources)
        ]
        monkeypatch.setattr(cluster.ray, "nodes", lambda: found)

    return make


@pytest.mark.parametrize(
    ("options", "resources", "in_packs", "places", "each"),
    [
        ({}, [{"CPU": 4.0}, {"CPU": 3.0}], 0, 7, {"cpu": 1, "gpu": 0}),
        ({}, [{"CPU": 4.0}, {}], 0, 4, {"cpu": 1, "gpu": 0}),
        ({"cpus_per_trial": 2}, [{"CPU": 5.0}], 0, 2, {"cpu": 2, "gpu": 0}),
        ({"gpus_per_trial": 0.25}, [{"CPU": 16.0, "GPU": 2.0}], 0, 8, {"cpu": 1, "gpu": 0.25}),
        ({"gpus_per_trial": 0.25}, [{"CPU": 3.0, "GPU": 2.0}], 0, 3, {"cpu": 1, "gpu": 0.25}),
        ({"max_concurrent": 2}, [{"CPU": 4.0}], 0, 2, {"cpu": 1, "gpu": 0}),
        ({"engine": "packed"}, [{"CPU": 16.0, "GPU": 1.0}], 48, 48, {"cpu": 0.33}),
        ({"engine": "packed"}, [{"CPU": 64.0, "GPU": 1.0}], 48, 48, {"cpu": 1}),
        ({"engine": "packed", "max_concurrent": 5}, [{"CPU": 16.0}], 48, 5, {"cpu": 0.33}),
        ({"engine": "packed"}, [{"CPU": 1.0}], 1000, 1000, {"cpu": 0.01}),
        ({}, [{}], 0, 1, {"cpu": 1, "gpu": 0}),
    ],
)
def test_places_and_shares(nodes, options, resources, in_packs, places, each):
    nodes(resources)
    options = SearchOptions(**options)
    assert cluster.num_places(cluster.nodes(), options, in_packs) == places
    assert cluster.trial_resources(options, in_packs) == each


def test_a_trial_asks_a_packer_of_its_node_else_another_else_none(nodes, monkeypatch):
    class Here:
        def get_node_id(self):
            return "node 1"

    monkeypatch.setattr(packers.ray, "get_runtime_context", Here)
    monkeypatch.setattr(packers, "_engine", lambda packer: packer.handle)
    started = [Started(name, f"node {name[0]}", 3, {}) for name in ("0a", "1a", "1b", "2a")]
    found = Packers(tuple(started), None)
    assert found.num_places == 12
    nodes([{"CPU": 1.0}] * 3)
    assert [found.engine(number) for number in range(4)] == ["1a", "1b", "1a", "1b"]
    nodes([{"CPU": 1.0}, {}, {"CPU": 1.0}])
    assert [found.engine(number) for number in range(3)] == ["0a", "2a", "0a"]
    nodes([{}, {}, {}, {"CPU": 1.0}])
    assert found.engine(0) is None
