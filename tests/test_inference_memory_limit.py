"""flux_lab.inference.memory_limit: the system refuses what is above the limit."""

import subprocess
import sys

import pytest

from flux_lab.inference import memory_limit
from flux_lab.inference.memory_limit import memory_group

TAKE = "import sys; taken = bytearray(int(sys.argv[1])); print(len(taken))"
LIMIT = 200 * 10**6


def take(count, group):
    command = [sys.executable, "-c", TAKE, str(count)]
    return subprocess.run(group.command(command), capture_output=True, text=True, check=False)


def test_a_group_holds_its_members_to_the_limit():
    with memory_group(LIMIT) as group:
        if group is None:
            pytest.skip("the system lets this user make no control group")
        few = take(50 * 10**6, group)
        assert few.stdout == "50000000\n"
        assert 50 * 10**6 < group.peak <= LIMIT
        assert take(400 * 10**6, group).returncode != 0
    assert not group.folder.exists()


def test_no_group_where_none_can_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_limit, "CGROUPS", tmp_path / "nothing")
    with memory_group(LIMIT) as group:
        assert group is None


@pytest.mark.parametrize(
    ("text", "folder", "limit_file"),
    [("4:memory:/a/b\n0::/c\n", "memory/a/b", "memory.limit_in_bytes"), ("0::/a\n", "a", "memory.max"), ("0::/\n", "", "memory.max")],
    ids=["version 1", "version 2", "version 2, at the root"],
)
@pytest.mark.parametrize("usable", [True, False])
def test_both_versions(text, folder, limit_file, usable, tmp_path, monkeypatch):
    """A folder stands in for the system's tree: a file that it would put into a new group has to be put there."""
    (tmp_path / "own").write_text(text)
    (tmp_path / "tree" / folder).mkdir(parents=True)
    monkeypatch.setattr(memory_limit, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory_limit, "CGROUPS", tmp_path / "tree")
    mkdir = memory_limit.Path.mkdir

    def filled(self, *arguments, **options):
        mkdir(self, *arguments, **options)
        if usable:
            (self / limit_file).write_text("max")

    monkeypatch.setattr(memory_limit.Path, "mkdir", filled)
    monkeypatch.setattr(memory_limit, "_remove", lambda folder: None)
    with memory_group(LIMIT) as group:
        if not usable:
            assert group is None
            assert list((tmp_path / "tree" / folder).iterdir()) == []
            return
        assert group.folder.parent == tmp_path / "tree" / folder
        assert (group.folder / limit_file).read_text() == str(LIMIT)
        assert group.command(["run", "it"])[-3:] == [str(group.folder / "cgroup.procs"), "run", "it"]


@pytest.mark.slow
def test_addresses_are_limited():
    code = f"from flux_lab.inference.memory_limit import limit_addresses; limit_addresses(10**9); {TAKE}"
    done = [
        subprocess.run([sys.executable, "-c", code, str(count)], capture_output=True, text=True, check=False) for count in (10**6, 10**9)
    ]
    assert done[0].stdout == "1000000\n"
    assert "MemoryError" in done[1].stderr
