"""How many trials run side by side, and what Ray keeps free for each, by what the nodes have."""

import pytest

from vae_hyperband.common.errors import SearchError
from vae_hyperband.search.config import SearchOptions
from vae_hyperband.tune import session


@pytest.fixture
def nodes(monkeypatch):
    """``nodes([{"CPU": 4}, ...])`` are those that Ray knows; a dead one has no resources."""

    def make(resources):
        found = [
            {"NodeID": f"node {n}", "Alive": bool(one), "Resources": one or {"CPU": 99.0}}
            for n, one in enumerate(resources)
        ]
        monkeypatch.setattr(session.ray, "nodes", lambda: found)

    return make


@pytest.mark.parametrize(
    ("options", "resources", "places", "each"),
    [
        ({}, [{"CPU": 4.0}, {"CPU": 3.0}], 7, {"cpu": 1, "gpu": 0}),
        ({}, [{"CPU": 4.0}, {}], 4, {"cpu": 1, "gpu": 0}),
        ({"cpus_per_trial": 2}, [{"CPU": 5.0}], 2, {"cpu": 2, "gpu": 0}),
        ({"gpus_per_trial": 0.25}, [{"CPU": 16.0, "GPU": 2.0}], 8, {"cpu": 1, "gpu": 0.25}),
        ({"gpus_per_trial": 0.25}, [{"CPU": 3.0, "GPU": 2.0}], 3, {"cpu": 1, "gpu": 0.25}),
        ({"max_concurrent": 2}, [{"CPU": 4.0}], 2, {"cpu": 1, "gpu": 0}),
        ({}, [{}], 1, {"cpu": 1, "gpu": 0}),
    ],
)
def test_places_and_shares(nodes, options, resources, places, each):
    nodes(resources)
    options = SearchOptions(**options)
    assert session.num_concurrent(session.nodes(), options) == places
    assert session.trial_resources(options) == each


def test_a_long_folder_for_temporary_files_is_not_ray_s(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert session.short_temp_dir() is None
    for length, short in ((10, False), (36, False), (60, True), (105, True)):
        folder = "/" + "t" * (length - 1)
        monkeypatch.setenv("TMPDIR", folder)
        found = session.short_temp_dir()
        assert (found is not None) == short, length
        path = f"{found or folder + '/ray'}/{session.SOCKET}"
        assert len(path) <= session.MAX_SOCKET_BYTES


@pytest.mark.parametrize(
    "error", [Exception("The process died.\nmore"), OSError("disk"), ValueError()]
)
def test_whatever_ray_raises_at_its_start_is_one_sentence(monkeypatch, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(session.ray, "init", fail)
    said = "Ray cannot be started on this machine"
    with pytest.raises(SearchError, match=said) as raised, session.ray_for(SearchOptions()):
        pass
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("threads", "cpus", "noted"), [(1, 1, False), (2, 2, True), (4, 4, True), (5, 4, False)]
)
def test_a_trial_of_more_threads_than_the_quota_runs_alone(
    monkeypatch, capsys, threads, cpus, noted
):
    """A search that began where the quota was larger goes on with its threads, as far as it can."""
    monkeypatch.setattr("vae_hyperband.common.process.cpu_quotas", lambda: [0.5])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    given = {}
    monkeypatch.setattr(session.ray, "init", lambda **settings: given.update(settings))
    options = SearchOptions(cpus_per_trial=threads)
    with session.ray_for(options):
        machine = {"CPU": float(given["num_cpus"])}
    assert machine == {"CPU": cpus}
    assert session.num_concurrent([machine], options) == 1
    assert ("the CPU quota here is 1 CPU" in capsys.readouterr().out) == noted
    if threads > 4:  # the affinity has no CPU for each
        with pytest.raises(SearchError, match="no machine has more than 4"):
            session.check_resources([machine], options)
    else:
        session.check_resources([machine], options)
