"""Children of a process that has imported a real library work, or are refused.

Run with these libraries installed: see tox.ini. Each process loads one, asks whether children may
be forked, and if so forks some which use it in earnest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

CHILDREN = 6

SECONDS = 120

#: Loads a library, and forks children where nothing speaks against it. It prints what does, and
#: what has become of each child. A child that hangs ends by its alarm.
TEMPLATE = """
import gc, json, os, signal, sys
from dagster_taskiq.execution.fork_safety import ForkTrial
from dagster_taskiq.execution.generators import reseed

trial = ForkTrial()
{load}
found = trial.hazard()
gc.freeze()
children = []
for _ in range(0 if found else {children}):
    pid = os.fork()
    if pid == 0:
        signal.alarm({seconds})
        reseed()
        try:
            use()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(it, 0)[1]) for it in children]
print(json.dumps({{"hazard": found, "codes": codes}}))
sys.stdout.flush()
os._exit(0)
"""

NUMPY = """
import numpy, scipy.linalg
def use():
    matrix = numpy.eye(800) * 2
    assert numpy.allclose(matrix @ matrix, numpy.eye(800) * 4)
    assert numpy.allclose(scipy.linalg.inv(matrix), numpy.eye(800) / 2)
"""

PANDAS = """
import io, pandas
def use():
    frame = pandas.DataFrame({"a": ["x", "y"] * 100_000, "b": range(200_000)})
    assert frame.groupby("a")["b"].count().to_dict() == {"x": 100_000, "y": 100_000}
    file = io.BytesIO()
    frame.to_parquet(file)
    assert pandas.read_parquet(file).equals(frame)
"""

PYARROW = """
import pyarrow, pyarrow.compute, pyarrow.parquet
def use():
    table = pyarrow.table({"a": ["x", "y"] * 100_000, "b": range(200_000)})
    sums = table.group_by("a").aggregate([("b", "count")])
    assert sorted(sums["b_count"].to_pylist()) == [100_000, 100_000]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    assert pyarrow.parquet.read_table(pyarrow.BufferReader(sink.getvalue())).equals(table)
"""

SKLEARN = """
import numpy, sklearn.cluster, sklearn.ensemble, sklearn.linear_model
def use():
    points = numpy.random.default_rng(1).random((4_000, 4))
    kinds = points[:, 0] > 0.5
    assert len(set(sklearn.cluster.KMeans(4, n_init=1).fit(points).labels_)) == 4
    boosted = sklearn.ensemble.HistGradientBoostingClassifier(max_iter=2).fit(points, kinds)
    assert boosted.score(points, kinds) > 0.5
    assert sklearn.linear_model.LogisticRegression().fit(points, kinds).score(points, kinds) > 0.9
"""

POLARS = """
import polars
def use():
    frame = polars.DataFrame({"a": ["x", "y"] * 100_000, "b": range(200_000)})
    counts = frame.lazy().group_by("a").len().sort("a").collect()
    assert counts.rows() == [("x", 100_000), ("y", 100_000)]
"""

DUCKDB = """
import duckdb
def use():
    with duckdb.connect() as database:
        query = "select i % 2 as k, count(*) from range(3000000) t(i) group by k order by k"
        assert database.execute(query).fetchall() == [(0, 1_500_000), (1, 1_500_000)]
"""

GRPC = """
import grpc
from concurrent.futures import ThreadPoolExecutor
class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)
def use():
    server = grpc.server(ThreadPoolExecutor(2), handlers=[Echo()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert channel.unary_unary("/a/b")(b"hello", timeout=60, wait_for_ready=True) == b"hello"
    server.stop(None).wait()
"""

BOTO3 = """
import boto3, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"<A><Buckets><Bucket><Name>first</Name></Bucket></Buckets></A>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): ...
def client(port):
    return boto3.client(
        "s3", region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="a", aws_secret_access_key="b",
    )
def use():
    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    answer = client(server.server_port).list_buckets()
    assert [it["Name"] for it in answer["Buckets"]] == ["first"]
    server.shutdown()
    thread.join()
"""

#: A channel to a server outside, as a module might keep one.
CHANNEL = """
channel = grpc.insecure_channel("127.0.0.1:1")
channel.subscribe(lambda state: None, try_to_connect=True)
"""


#: A file that a module reads as a whole when it is imported.
PARQUET = """
pyarrow.parquet.write_table(pyarrow.table({"a": list(range(1000))}), "a.parquet")
kept = pyarrow.parquet.read_table("a.parquet")
"""


@dataclass(frozen=True)
class Case:
    """What a module does when it is imported.

    Args:
        load: imports of it, and ``use``, what a step does then.
        before: what is done already when it is imported.
        outcome: ``works`` where children must be allowed; ``refused`` where they must not be, as
            they were seen to hang or crash; ``either`` where that depends on the version or the
            number of processors. Children that are allowed must work in any case.
    """

    load: str
    before: str = ""
    outcome: str = "works"


CASES = {
    "numpy": Case(NUMPY),
    "numpy, used": Case(NUMPY, "use()"),
    "pandas": Case(PANDAS),
    "pandas, used": Case(PANDAS, "use()", "either"),
    "pandas, without threads": Case(
        PANDAS, "pandas.DataFrame({'a': ['x', 'y'], 'b': [1, 2]}).groupby('a').sum()"
    ),
    "pyarrow": Case(PYARROW),
    "pyarrow, used": Case(PYARROW, "use()", "either"),
    "pyarrow, a Parquet file read": Case(PYARROW, PARQUET, "refused"),
    "scikit-learn": Case(SKLEARN),
    "scikit-learn, used": Case(SKLEARN, "use()", "refused"),
    "polars": Case(POLARS),
    "polars, used": Case(POLARS, "use()", "refused"),
    "duckdb": Case(DUCKDB),
    "duckdb, used and closed": Case(DUCKDB, "use()"),
    "duckdb, in memory": Case(DUCKDB, "database = duckdb.connect()", "either"),
    "duckdb, a file": Case(DUCKDB, "database = duckdb.connect('a.duckdb')", "refused"),
    "grpc": Case(GRPC),
    "grpc, used": Case(GRPC, "use()"),
    "grpc, a channel": Case(GRPC, CHANNEL, "refused"),
    "boto3": Case(BOTO3),
    "boto3, a client": Case(BOTO3, "kept = client(1)"),
    "boto3, used": Case(BOTO3, "use()"),
    "snowflake": Case(
        "import snowflake.connector\ndef use(): raise AssertionError", outcome="refused"
    ),
    "all that works": Case("".join((NUMPY, PANDAS, PYARROW, DUCKDB, GRPC, BOTO3, POLARS, SKLEARN))),
}


def _run(directory: Path, script: str) -> tuple[str, list[int], str]:
    """The hazard, the children's exit codes, and what was written to standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        # else threads of OpenMP that wait use the processors that all the others need; with one
        # processor there would be none
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=SECONDS + 40)
    finally:
        if process.poll() is None:  # it hangs
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, errors
    answer = json.loads(output.splitlines()[-1])
    return answer["hazard"], answer["codes"], errors


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_children_work_or_are_refused(tmp_path: Path, case: Case) -> None:
    load = f"{case.load}\n{case.before}\n"
    hazard, codes, errors = _run(
        tmp_path, TEMPLATE.format(load=load, children=CHILDREN, seconds=SECONDS)
    )
    if case.outcome == "refused":
        assert hazard
    elif case.outcome == "works":
        assert hazard == ""
    assert codes == ([] if hazard else [0] * CHILDREN), errors


def test_each_child_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    load = """
import numpy, random
numpy.random.random()
def use():
    with open("numbers", "a") as file:
        file.write(f"{random.random()} {numpy.random.random()}\\n")
"""
    script = TEMPLATE.format(load=load, children=CHILDREN, seconds=SECONDS)
    hazard, codes, errors = _run(tmp_path, script)
    assert (hazard, codes) == ("", [0] * CHILDREN), errors
    lines = (tmp_path / "numbers").read_text().split()
    assert len(set(lines)) == 2 * CHILDREN
