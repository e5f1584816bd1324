"""Who may talk to the processes of an instance, with real ones: both queue ports, the four Unix sockets."""
import os
import random
import re
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from openai import OpenAI

from server import BIN, PATIENCE_S, ROOT, Server, wait_for

TOKEN = "00ff81" + "5c" * 28 + "7e"
UNAUTHENTICATED = ("16", "the queue demands the instance token")
STATS = "wintserve.proto.Cache/Stats"
METHODS = (STATS, "wintserve.proto.Cache/Session", "wintserve.proto.WorkQueue/Attach", "none.None/None",
           "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")


def grpc_call(address, method, token=None, tls=()):
    """A gRPC call by curl, which knows nothing of us: (grpc-status, grpc-message, every header's name), or
    (None, curl's exit code, ()) when there was no answer. address: "HOST:PORT", or the path of a socket. An
    empty message goes along where it is read: curl takes an answer before the message's end as an error."""
    command = ["curl", "-sS", "--max-time", "20", "-D", "-", "-o", "/dev/null", "-X", "POST",
               "-H", "content-type: application/grpc", "-H", "te: trailers", "-H", "user-agent:", "-H", "accept:"]
    if (method, token) == (STATS, TOKEN):
        command += ["--data-binary", "@-"]
    if token is not None:
        command += ["-H", f"wintserve-token: {token}"]
    if address.startswith("/"):
        command += ["--unix-socket", address]
        address = "localhost"
    command += ["--http2", *tls] if tls else ["--http2-prior-knowledge"]
    command.append(f"{'https' if tls else 'http'}://{address}/{method}")
    done = subprocess.run([str(c) for c in command], input=b"\0" * 5, capture_output=True,
                          timeout=30)
    headers = dict(re.findall(r"^([a-z0-9-]+): (.*?)\r?$", done.stdout.decode(errors="replace"), re.MULTILINE))
    if "grpc-status" not in headers:
        return None, done.returncode, ()
    return headers["grpc-status"], headers.get("grpc-message", ""), tuple(sorted(headers))


def answer(server):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY_API_KEY", max_retries=0)
    return client.completions.create(model="", prompt="床前明月光", temperature=0, max_tokens=8).choices[0].text


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A CA, and certificates of it for this machine's addresses, as docs/SECURITY.md has them made."""
    directory = tmp_path_factory.mktemp("certificates")

    def openssl(*args):
        subprocess.run(["openssl", *args], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for ca in ("ca", "other-ca"):
        openssl("req", "-x509", *key, "-days", "1", "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem")
    (directory / "names").write_text(f"subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{own_address()}\n")
    for name, ca in (("queue", "ca"), ("stranger", "other-ca")):
        openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial",
                "-days", "1", "-extfile", "names", "-out", f"{name}.pem")
    return directory


def own_address():
    """An address of this machine that is not loopback; loopback where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))  # sends nothing
            return s.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def sockets_of(server):
    return {path.name: path for path in server.runtime.rglob("*.sock")}


def test_without_the_token_every_queue_says_the_same_and_nothing_else(start, token_file):
    server = start("--queue-token-file", token_file).wait_ready()
    sockets = sockets_of(server)
    places = [f"127.0.0.1:{server.queue_port}", f"127.0.0.1:{server.cache_port}", str(sockets["work_queue.sock"]),
              str(sockets["cache.sock"])]
    nearly = TOKEN[:-1] + "f"
    for place in places:
        for method in METHODS:
            for token in (None, nearly, "0" * 64, ""):
                status, message, headers = grpc_call(place, method, token)
                assert (status, message) == UNAUTHENTICATED, (place, method, token)
                assert set(headers) <= {"content-type", "grpc-status", "grpc-message", "date"}, headers
    assert grpc_call(places[1], STATS, TOKEN)[0] == "0"
    assert grpc_call(places[3], STATS, TOKEN)[0] == "0"
    assert grpc_call(places[1], METHODS[3], TOKEN)[0] == "12"  # UNIMPLEMENTED, for one who may know
    assert answer(server)
    assert server.stop() == 0, server.log()


def test_the_token_is_in_no_log_argument_or_environment(tmp_path, monkeypatch, token_file):
    monkeypatch.setenv("GRPC_TRACE", "all")  # whose lines would show metadata
    monkeypatch.setenv("GRPC_VERBOSITY", "debug")
    server = Server(tmp_path, "--queue-token-file", token_file, "--log-level", "debug")
    try:
        server.wait_ready()
        grpc_call(f"127.0.0.1:{server.cache_port}", STATS, "1" * 64)
        assert answer(server)
        processes = server.processes()
        assert len(processes) == 4, processes
        secrets = (TOKEN.encode(), TOKEN.upper().encode(), bytes.fromhex(TOKEN))
        for pid, name in processes.items():
            for file in ("cmdline", "environ"):
                content = Path(f"/proc/{pid}/{file}").read_bytes()
                assert not any(secret in content for secret in secrets), (name, file)
        # A cache manager that is started anew has it from the same place.
        os.kill(server.pids_of("wintserve-cache-manager")[0], signal.SIGKILL)
        wait_for(lambda: grpc_call(f"127.0.0.1:{server.cache_port}", STATS, TOKEN)[0] == "0", PATIENCE_S, "a new one")
    finally:
        server.stop()
    log = server.log_path.read_bytes()
    assert b"debug" in log
    assert not any(secret in log for secret in secrets)


def test_keys_reach_the_api_server_and_no_other_process(tmp_path, monkeypatch):
    monkeypatch.setenv("FD_API_KEY", "sk-of-the-environment")
    monkeypatch.setenv("SOMEBODYS_PASSWORD", "hunter2-of-somebody")
    server = Server(tmp_path, "--log-level", "debug")
    try:
        server.wait_ready()
        client = OpenAI(base_url=f"{server.url}/v1", api_key="sk-of-the-environment", max_retries=0)
        assert client.completions.create(model="", prompt="床前明月光", max_tokens=2).choices[0].text
        processes = server.processes()
        assert len(processes) == 4, processes
        for pid, name in processes.items():
            for file in ("cmdline", "environ"):
                content = Path(f"/proc/{pid}/{file}").read_bytes()
                assert b"sk-of-the-environment" not in content, (name, file)
                # What the launcher was started with by others is theirs to keep secret.
                assert name == "wintserve" or b"hunter2" not in content, (name, file)
        # Not in memory, either: what the launcher hands over has no key for those who need none.
        for name in ("wintserve-engine-worker", "wintserve-cache-manager"):
            assert not in_memory(server.pids_of(name)[0], b"sk-of-the-environment"), name
        assert in_memory(server.pids_of("wintserve-api-server")[0], b"sk-of-the-environment")
    finally:
        server.stop()
    assert "sk-of-the-environment" not in server.log()


def in_memory(pid, text):
    """Whether the bytes are in the memory that the process alone may write to, but for large pieces."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, mode, *rest = line.split()
            if not mode.startswith("rw") or "p" not in mode or rest[-1].startswith("[v"):
                continue
            begin, end = (int(number, 16) for number in place.split("-"))
            if end - begin > 64 << 20:
                continue  # weights and pools
            try:
                memory.seek(begin)
                if text in memory.read(end - begin):
                    return True
            except OSError:
                continue
    return False


def test_the_sockets_are_for_their_user_alone(start):
    server = start().wait_ready()
    sockets = sockets_of(server)
    assert set(sockets) == {"work_queue.sock", "cache.sock", "memory.sock", "supervisor.sock"}
    for path in sockets.values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        directory = path.parent.lstat()
        assert stat.S_ISDIR(directory.st_mode) and stat.S_IMODE(directory.st_mode) == 0o700
        assert directory.st_uid == os.geteuid()
    if os.geteuid() != 0:
        return
    # Even where the directories let another user in, the sockets do not; and behind them SO_PEERCRED does not.
    parents = [path for path in sockets["memory.sock"].parents if path != Path("/") and path != Path("/tmp")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in parents}
    try:
        for path in parents:
            path.chmod(modes[path] | 0o011)
        for name, path in sockets.items():
            kind = "SOCK_SEQPACKET" if name in ("memory.sock", "supervisor.sock") else "SOCK_STREAM"
            connect = f"import socket; socket.socket(socket.AF_UNIX, socket.{kind}).connect({str(path)!r})"
            tried = subprocess.run(["python3", "-c", connect], user=65534, cwd="/", capture_output=True, text=True)
            assert "PermissionError" in tried.stderr, (name, tried.stderr)
    finally:
        for path in parents:
            path.chmod(modes[path])
    assert answer(server)


def random_packets(seed):
    rng = random.Random(seed)
    return [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(200), b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" +
            rng.randbytes(100), b"\xa3\x06" * 20_000] + [rng.randbytes(rng.randrange(1, 50_000)) for _ in range(40)]


def test_rubbish_on_every_socket_stops_nothing(start):
    server = start().wait_ready()
    before = answer(server)
    sockets = sockets_of(server)
    pids = server.processes()
    for name, path in sockets.items():
        packets = name in ("memory.sock", "supervisor.sock")
        for bytes_ in random_packets(1):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if packets else socket.SOCK_STREAM) as s:
                s.connect(str(path))
                try:
                    s.sendall(bytes_)
                except OSError:
                    pass
    for port in (server.queue_port, server.cache_port):
        for bytes_ in random_packets(2):
            with socket.create_connection(("127.0.0.1", port)) as s:
                try:
                    s.sendall(bytes_)
                except OSError:
                    pass
    assert answer(server) == before
    assert server.processes() == pids
    assert server.stop() == 0, server.log()


def num_descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_flood_of_silent_connections_passes(start):
    server = start().wait_ready()
    pids = list(server.processes())
    before = {pid: num_descriptors(pid) for pid in pids}
    silent = []
    for port in (server.queue_port, server.cache_port):
        silent += [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
    for name in ("memory.sock", "supervisor.sock"):
        for _ in range(200):
            s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            s.connect(str(sockets_of(server)[name]))
            silent.append(s)
    assert answer(server)
    # The launcher and the cache manager still serve: a new cache manager needs both.
    os.kill(server.pids_of("wintserve-cache-manager")[0], signal.SIGKILL)
    wait_for(lambda: "starting it again" in server.log(), PATIENCE_S, "the launcher noticed")
    assert answer(server)

    def settled():  # a few dozen may wait on the launcher's socket, where only newer ones take their place
        return all(num_descriptors(pid) < before[pid] + 80 for pid in pids if Path(f"/proc/{pid}/fd").exists())
    wait_for(settled, PATIENCE_S, "the connections have been dropped")
    for s in silent:
        s.close()
    assert server.stop() == 0, server.log()


def test_http_connections_take_no_descriptor_that_a_worker_needs(start):
    server = start("--max-concurrency", 64, prefix=("prlimit", "--nofile=256:256")).wait_ready()
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(400)]
    assert server.get("/live")[0] == 200
    os.kill(server.pids_of("wintserve-engine-worker")[0], signal.SIGKILL)
    wait_for(lambda: "recovered within" in server.log(), PATIENCE_S, "the new worker is attached")
    assert answer(server)
    assert num_descriptors(server.pids_of("wintserve-api-server")[0]) < 256 - 64
    for s in silent:
        s.close()
    assert server.stop() == 0, server.log()


def tls_flags(certificates, name="queue", ca="ca"):
    flags = ["--queue-tls-cert", certificates / f"{name}.pem", "--queue-tls-key", certificates / f"{name}.key"]
    return flags + (["--queue-tls-ca", certificates / f"{ca}.pem"] if ca else [])


def test_mutual_tls_beyond_loopback(start, token_file, certificates):
    server = start("--queue-host", "0.0.0.0", "--queue-token-file", token_file, *tls_flags(certificates)).wait_ready()
    assert answer(server)
    ours = ("--cacert", certificates / "ca.pem", "--cert", certificates / "queue.pem", "--key",
            certificates / "queue.key")
    nameless = ("--cacert", certificates / "ca.pem")
    stranger = ("--cacert", certificates / "ca.pem", "--cert", certificates / "stranger.pem", "--key",
                certificates / "stranger.key")
    for host in {"127.0.0.1", own_address()}:
        place = f"{host}:{server.cache_port}"
        assert grpc_call(place, STATS, TOKEN, tls=ours)[0] == "0"
        assert grpc_call(place, STATS, None, tls=ours)[:2] == UNAUTHENTICATED
        assert grpc_call(f"{host}:{server.queue_port}", STATS, None, tls=ours)[:2] == UNAUTHENTICATED
        for port in (server.cache_port, server.queue_port):
            for tls in ((), nameless, stranger):
                assert grpc_call(f"{host}:{port}", STATS, TOKEN, tls=tls)[0] is None, (port, tls)
    os.kill(server.pids_of("wintserve-cache-manager")[0], signal.SIGKILL)
    wait_for(lambda: grpc_call(f"127.0.0.1:{server.cache_port}", STATS, TOKEN, tls=ours)[0] == "0", PATIENCE_S, "TLS again")
    assert grpc_call(f"127.0.0.1:{server.cache_port}", STATS, TOKEN)[0] is None
    assert answer(server)
    assert server.stop() == 0, server.log()


def test_insecure_bind_is_a_warning(start, token_file):
    server = start("--queue-host", "0.0.0.0", "--insecure-bind", "--queue-token-file", token_file).wait_ready()
    assert "--insecure-bind: the queue ports on 0.0.0.0 have no TLS" in server.log()
    assert grpc_call(f"{own_address()}:{server.cache_port}", STATS, TOKEN)[0] == "0"
    assert server.stop() == 0, server.log()


def test_what_is_wrong_with_binds_and_files_is_one_line(tmp_path, certificates):
    def run(*flags):
        done = subprocess.run([str(BIN / "wintserve"), "serve", "--port", "0", *map(str, flags)], cwd=ROOT,
                              capture_output=True, text=True, timeout=30)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        return done.returncode, errors[0]

    missing = tmp_path / "missing.pem"
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("rubbish")
    good = certificates / "queue.pem"
    assert run("--queue-host", "0.0.0.0") == (64, "error: --queue-host: beyond loopback the queue ports need "
                                              "--queue-tls-cert and --queue-tls-key (with --queue-tls-ca for mutual "
                                              "TLS), or --insecure-bind (got 0.0.0.0)")
    assert run("--queue-tls-cert", missing, "--queue-tls-key", missing) == (
        64, f"error: --queue-tls-cert: {missing}: No such file or directory")
    assert run("--queue-tls-cert", rubbish, "--queue-tls-key", rubbish) == (
        64, f"error: --queue-tls-cert: {rubbish}: holds no PEM certificate")
    assert run("--queue-tls-cert", good, "--queue-tls-key", certificates / "stranger.key") == (
        64, f"error: --queue-tls-key: {certificates / 'stranger.key'}: is not the key of the certificate in {good}")
    assert run(*tls_flags(certificates, ca=None), "--queue-tls-ca", rubbish) == (
        64, f"error: --queue-tls-ca: {rubbish}: holds no PEM certificate")
    assert run("--queue-token-file", rubbish) == (
        64, f"error: --queue-token-file: {rubbish}: must hold 64 hexadecimal digits (openssl rand -hex 32 makes them)")


def test_a_key_that_everybody_can_read_is_a_warning(start, certificates, tmp_path):
    key = tmp_path / "queue.key"
    key.write_bytes((certificates / "queue.key").read_bytes())
    key.chmod(0o644)
    server = start("--queue-tls-cert", certificates / "queue.pem", "--queue-tls-key", key).wait_ready()
    assert f"--queue-tls-key: {key}: every user of this machine can read the key (mode 0644)" in server.log()
    assert server.stop() == 0, server.log()
