"""Slurm's variables: who the tasks of a step are, and where."""

import pytest

from tfzero.workers.slurm import expand_counts, expand_nodes, place_tasks, task_addresses


@pytest.mark.parametrize(
    "text, nodes",
    [
        ("n1", ["n1"]),
        ("gnode[10,20,25,37]", ["gnode10", "gnode20", "gnode25", "gnode37"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[10,9]", ["n10", "n9"]),  # in its order
        ("n[08-10,099-101]", ["n08", "n09", "n10", "n099", "n100", "n101"]),
        ("n[1-2],m5,o[3-4,6]", ["n1", "n2", "m5", "o3", "o4", "o6"]),
        ("m5,n[1-2]", ["m5", "n1", "n2"]),
        ("rack[0-1]n[3-4]", ["rack0n3", "rack0n4", "rack1n3", "rack1n4"]),
        ("n[1-2].example.org,x-1", ["n1.example.org", "n2.example.org", "x-1"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
        (" n[1] ", ["n1"]),
    ],
)
def test_nodes(text, nodes):
    assert expand_nodes(text) == nodes


@pytest.mark.parametrize(
    "text",
    ["", " ", "n[", "n]", "n[1", "n[1-2", "n[]", "n[a-b]", "n[2-1]", "n[1-]", "n[-1]", "n[1,,2]", "n1,,n2", ",n1",
     "n1,", "n[[1]]", "n[1-2]]", "n[1-99999999]", "r[1-99999]n[1-99999]"],
)  # fmt: skip
def test_malformed_nodes(text):
    with pytest.raises(ValueError, match=r"a form like n\[1-3,7\],m02. Received: "):
        expand_nodes(text)


@pytest.mark.parametrize(
    "text, counts", [("4", [4]), ("1(x4)", [1] * 4), ("2(x3),1", [2, 2, 2, 1]), ("5,4(x3)", [5, 4, 4, 4])]
)
def test_counts(text, counts):
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "x", "2(3)", "2(x)", "1,,2", "-1", "1(x9999999)"])
def test_malformed_counts(text):
    with pytest.raises(ValueError, match=r"a form like 2\(x3\),1. Received: "):
        expand_counts(text)


@pytest.mark.parametrize(
    "distribution, places",
    [(("block",), [0, 0, 0, 1, 2, 2]), (("cyclic",), [0, 1, 2, 0, 2, 0]), (("plane", 2), [0, 0, 1, 2, 2, 0])],
)
def test_places(distribution, places):
    assert place_tasks([3, 1, 2], *distribution) == places


def step(nodes="n[9-10],m1", counts="2(x2),1", rank=0, **more):
    size = sum(expand_counts(counts))
    names = {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": counts}
    return {**names, "SLURM_PROCID": str(rank), "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", **more}


def test_addresses_are_the_same_for_all_tasks():
    first = 15000 + 64 * (31 * 7 % 277)
    expected = [f"n9:{first}", f"n9:{first + 1}", f"n10:{first}", f"n10:{first + 1}", f"m1:{first}"]
    places = [("0", "0", "n9"), ("0", "1", "n9"), ("1", "0", "n10"), ("1", "1", "n10"), ("2", "0", "m1")]
    for rank, (node, local, name) in enumerate(places):
        own = {"SLURM_NODEID": node, "SLURM_LOCALID": local, "SLURMD_NODENAME": name}
        assert task_addresses(step(rank=rank, **own)) == expected
    assert task_addresses(step(), port=4000)[3] == "n10:4001"
    cyclic = task_addresses(step(SLURM_DISTRIBUTION="cyclic:block"), port=4000)
    assert cyclic == ["n9:4000", "n10:4000", "m1:4000", "n9:4001", "n10:4001"]
    plane = task_addresses(step(SLURM_DISTRIBUTION="plane", SLURM_DIST_PLANESIZE="1"), port=4000)
    assert plane == cyclic == task_addresses(step(SLURM_DISTRIBUTION="plane=1"), port=4000)


def test_a_steps_variables_come_before_its_jobs():
    more = {"SLURM_JOB_NODELIST": "x[1-9]", "SLURM_TASKS_PER_NODE": "9(x9)", "SLURM_NTASKS": "81"}
    assert task_addresses(step("n1", "2", **more), port=1) == ["n1:1", "n1:2"]
    whole = {k: v for k, v in step("n1", "2").items() if k not in ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")}
    assert task_addresses({**whole, "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "2"}, port=1) == [
        "n1:1",
        "n1:2",
    ]


def test_steps_beside_each_other_have_ports_of_their_own():
    firsts = {
        task_addresses(step("n1", "2", SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(number)))[0]
        for job in range(1000, 1008)
        for number in range(30)
    }
    ports = [int(each.rpartition(":")[2]) for each in firsts]
    assert len(firsts) == 240 and min(ports) >= 15000 and max(ports) + 64 <= 32768


@pytest.mark.parametrize(
    "environ, problem",
    [
        (step(rank=5), "the task's number is too large"),
        (step(SLURM_STEP_NUM_TASKS="4"), "they do not fit together"),
        ({**step(), "SLURM_STEP_TASKS_PER_NODE": "999999999999(x3)"}, "they do not fit together"),
        (step(counts="2(x2)"), "they do not fit together"),
        (step(SLURM_NODEID="1"), "SLURM_NODEID of task 0 is '1', where '0' was expected"),
        (step(SLURM_LOCALID="1"), "SLURM_LOCALID of task 0 is '1'"),
        (step(SLURMD_NODENAME="n10"), "SLURMD_NODENAME of task 0 is 'n10', where 'n9' was expected"),
        (step(SLURM_DISTRIBUTION="arbitrary"), "tasks are placed by 'arbitrary'"),
        (step(SLURM_HET_SIZE="2"), "the job is heterogeneous"),
        (step(SLURM_PROCID="x"), "SLURM_PROCID must be a number"),
        (step(SLURM_STEP_ID="-1"), "SLURM_STEP_ID must be a number"),
    ],
)
def test_variables_that_do_not_fit_are_refused(environ, problem):
    with pytest.raises(ValueError) as raised:
        task_addresses(environ)
    assert problem in str(raised.value) and "Received: " in str(raised.value)


def test_ports_end():
    with pytest.raises(ValueError, match="2 tasks on one node need as many ports. Received: the first one, 65535"):
        task_addresses(step(), port=65535)
