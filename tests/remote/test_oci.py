#!/usr/bin/env python3
"""-deliver oci and oci-plain: the registry and the key provider of a server.  usage: test_oci.py CVMS [-v] [NAME...]

skopeo, where it is, fetches plain images; Debian's has no key providers, so encrypted ones are fetched and opened here, by
Python's http.client, cryptography and grpcio."""
import base64
import gzip
import hashlib
import hmac
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import harness  # noqa: E402
from harness import LIMIT, Server, W, check, fields, first, has, hasnot, named, need, read, run, same, sha3, temp, write  # noqa: E402

import grpc  # noqa: E402
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: E402

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
UNWRAP = b'{"op":"keyunwrap","keywrapparams":{},"keyunwrapparams":{"dc":{"Parameters":{}},"annotation":"eA=="}}'


def serve(name, way, *more, **kw):
    return Server(name, "-deliver", way, "-algo-type", "python", *more, base=kw.pop("base", ["-algo-path", W.algo, "-data-paths", W.data]), **kw)


class Registry:
    """What the manifest of a server says, and what is behind it."""
    def __init__(self, server, job=None):
        self.server = server
        manifest = server.agent(job).manifest()
        need(manifest, "no manifest")
        self.algorithm = first(manifest, 5)
        self.datasets = [v for n, v in fields(manifest) if n == 4]
        self.kbs = first(manifest, 8)

    def source(self, resource, at=3):
        """(type, URL, key path, encrypted)"""
        s = first(resource, at)
        return first(s, 1).decode(), first(s, 2).decode(), first(s, 3).decode(), bool(first(s, 4, 0))

    def name(self, resource, at=3):
        url = self.source(resource, at)[1]
        found = re.fullmatch(rf"docker://{re.escape(self.server.address)}/([a-z0-9-]+):latest", url)
        need(found, url)
        return found.group(1)

    def get(self, path, method="GET"):
        c = http.client.HTTPConnection(self.server.address, timeout=LIMIT)
        c.request(method, path)
        r = c.getresponse()
        body = r.read()
        c.close()
        return r.status, r.getheader("content-type"), body

    def image(self, name):
        """(layer's description, its bytes, the config), each fetched by its digest and checked."""
        status, kind, body = self.get(f"/v2/{name}/manifests/latest")
        same(f"{name}: manifest", (status, kind), (200, MANIFEST))
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        same(f"{name}: manifest by digest", self.get(f"/v2/{name}/manifests/{digest}"), (200, MANIFEST, body))
        manifest = json.loads(body)
        parts = []
        for part in (manifest["config"], *manifest["layers"]):
            status, kind, body = self.get(f"/v2/{name}/blobs/{part['digest']}")
            same(f"{name}: {part['mediaType']}", (status, len(body), "sha256:" + hashlib.sha256(body).hexdigest()),
                 (200, part["size"], part["digest"]))
            parts.append(body)
        return manifest["layers"][0], parts[1], json.loads(parts[0])

    def files(self, name, key=None):
        layer, body, config = self.image(name)
        if key:
            options = json.loads(base64.b64decode(layer["annotations"]["org.opencontainers.image.enc.pubopts"]))
            same(f"{name}: mac", base64.b64decode(options["hmac"]), hmac.digest(key, body, "sha256"))
            nonce = base64.b64decode(options["cipheroptions"]["nonce"])
            body = gzip.decompress(Cipher(algorithms.AES(key), modes.CTR(nonce)).decryptor().update(body))
        same(f"{name}: diff_id", config["rootfs"]["diff_ids"], ["sha256:" + hashlib.sha256(body).hexdigest()])
        with tarfile.open(fileobj=io.BytesIO(body)) as t:
            return {m.name: t.extractfile(m).read() for m in t}

    def unwrap(self, request=UNWRAP):
        """What ocicrypt gets for a layer's wrapped key."""
        with grpc.insecure_channel(self.server.address) as channel:
            call = channel.unary_unary("/keyprovider.KeyProviderService/UnWrapKey", lambda b: b, lambda b: b)
            answer = json.loads(first(call(harness.field(1, request), timeout=LIMIT), 1))
        return base64.b64decode(json.loads(base64.b64decode(answer["keyunwrapresults"]["optsdata"]))["symkey"])


def test_plain():
    with serve("oci-plain", "oci-plain") as s:
        r = Registry(s)
        for resource, at, path in ((r.algorithm, 3, W.algo), (r.datasets[0], 4, W.data)):
            name = r.name(resource, at)
            same(f"{name}: files", r.files(name), {os.path.basename(path): read(path)})
            same(f"{name}: hash", first(resource, 1).hex(), sha3(read(path)))
            same(f"{name}: source", r.source(resource, at)[::3], ("oci-image", False))
            same(f"{name}: the broker is enabled", bool(first(first(resource, 6), 2, 0)), True)
        same("the oldest agents' broker is enabled", bool(first(r.kbs, 2, 0)), True)
        hasnot("no key provider", run("list", ["health", s.address]).out, "keyprovider")
        try:
            r.unwrap()
            check("UnWrapKey without oci", False)
        except grpc.RpcError as e:
            same("UnWrapKey without oci", e.code(), grpc.StatusCode.UNIMPLEMENTED)


def test_encrypted():
    with serve("oci", "oci") as s:
        r = Registry(s)
        key = r.unwrap()
        same("the key", len(key), 32)
        for resource, at, path in ((r.algorithm, 3, W.algo), (r.datasets[0], 4, W.data)):
            name = r.name(resource, at)
            same(f"{name}: files", r.files(name, key), {os.path.basename(path): read(path)})
            same(f"{name}: hash", first(resource, 1).hex(), sha3(read(path)))
            kind, _, kbs_path, encrypted = r.source(resource, at)
            same(f"{name}: source", (kind, bool(kbs_path), encrypted), ("oci-image", True, True))
        for bad in (b"", b"{}", b'{"op":"keywrap"}', b"\xff" * 100):
            try:
                r.unwrap(bad)
                check(f"UnWrapKey {bad[:9]}", False)
            except grpc.RpcError as e:
                same(f"UnWrapKey {bad[:9]}", e.code(), grpc.StatusCode.INVALID_ARGUMENT)
    with serve("oci again", "oci") as s:
        same("another run has another key", Registry(s).unwrap() == key, False)


def test_paths():
    with serve("paths", "oci-plain") as s:
        r = Registry(s)
        name = r.name(r.algorithm)
        same("/v2/", r.get("/v2/")[0], 200)
        for path in ("/v2/", f"/v2/{name}/manifests/latest"):
            status, _, body = r.get(path, "HEAD")
            same(f"HEAD {path}", (status, body), (200, b""))
        digest = json.loads(r.get(f"/v2/{name}/manifests/latest")[2])["layers"][0]["digest"]
        for path in ("/v2", "/v2/none/manifests/latest", f"/v2/{name}", f"/v2/{name}/manifests/", f"/v2/{name}/manifests/none",
                     f"/v2/{name}/blobs/latest", f"/v2/{name}/blobs/sha256:{'0' * 64}", f"/v2/{name}/blobs/{digest}x",
                     f"/v2/{name}/blobs/{digest[:-1]}", f"/v2/{name}x/blobs/{digest}", f"/v2/{name}/tags/list", "/v2/../etc/passwd"):
            same(path, r.get(path)[0], 404)
        same("POST", r.get(f"/v2/{name}/blobs/uploads/", "POST")[0] in (404, 405, 415), True)


def test_side_by_side():
    """The key is asked for while the layer's body is outstanding."""
    big = write("big.csv", os.urandom(8 << 20))
    with serve("side by side", "oci", base=["-algo-path", W.algo, "-data-paths", big]) as s:
        r = Registry(s)
        name = r.name(r.datasets[0], 4)
        digest = json.loads(r.get(f"/v2/{name}/manifests/latest")[2])["layers"][0]["digest"]
        c = http.client.HTTPConnection(s.address, timeout=LIMIT)
        c.request("GET", f"/v2/{name}/blobs/{digest}")
        answer = c.getresponse()
        got = answer.read(100)
        key = r.unwrap()
        got += answer.read()
        same("side by side: the layer", "sha256:" + hashlib.sha256(got).hexdigest(), digest)
        same("side by side: files", r.files(name, key), {"big.csv": read(big)})


def copied(url, *flags, **env):
    """What skopeo makes of an image: the files in its layer."""
    if not shutil.which("skopeo"):
        raise harness.Skip("no skopeo; run tests/install.sh")
    to = os.path.join(temp(), "image")
    p = subprocess.run(["skopeo", "copy", "--insecure-policy", *flags, url, f"oci:{to}:latest"], capture_output=True, text=True,
                       timeout=3 * LIMIT, env=dict(os.environ, **env))
    need(same(f"skopeo {url}", (p.returncode, p.stderr), (0, "")), "no image")
    blob = lambda d: read(os.path.join(to, "blobs", "sha256", d["digest"][7:]))
    manifest = json.loads(blob(json.loads(read(os.path.join(to, "index.json")))["manifests"][0]))
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(blob(manifest["layers"][0])))) as t:
        return {m.name: t.extractfile(m).read() for m in t}


def test_skopeo():
    folder = temp()
    for n in ("a.csv", "sub/b.csv"):
        write(os.path.join(folder, n), n)
    with serve("skopeo", "oci-plain", base=["-algo-path", W.algo, "-data-paths", f"{W.data},{folder}"]) as s:
        r = Registry(s)
        for resource, at, files in ((r.algorithm, 3, {"algo.py": read(W.algo)}), (r.datasets[0], 4, {"data.csv": read(W.data)}),
                                    (r.datasets[1], 4, {"a.csv": b"a.csv", "sub/b.csv": b"sub/b.csv"})):
            url = r.source(resource, at)[1]
            same(f"skopeo {url}: files", copied(url, "--src-tls-verify=false", "--dest-tls-verify=false"), files)
        same("its try of TLS is told once", len(re.findall("ClientHello: skopeo .*--src-tls-verify=false", s.err.text())), 1)
        same("a folder's hash", first(r.datasets[1], 1).hex(), run("checksum", ["checksum", folder]).out.split()[0])
        same("a folder is unpacked", bool(first(r.datasets[1], 5, 0)), True)


def test_skopeo_over_tls():
    where = temp()
    harness.self_signed("localhost", where)
    pem, key, certs = os.path.join(where, "localhost.pem"), os.path.join(where, "localhost.key"), temp()
    shutil.copy(pem, os.path.join(certs, "ca.crt"))
    with serve("skopeo over TLS", "oci-plain", env={"SERVER_CERT": pem, "SERVER_KEY": key, "HOST": "localhost"}) as s:
        url = json.loads(s.stand_in("-once", "-ca", pem).out)["algorithm"]["source"]["url"]
        for flags, env in ((["--src-cert-dir", certs], {}), ([], {"SSL_CERT_FILE": pem})):
            same(f"{flags} {env}: files", copied(url, *flags, **env), {"algo.py": read(W.algo)})


def test_names():
    """A file that no agent would take of an image, before the port opens."""
    for kind, algo, told in (("python", "algo.txt", r"\.py"), ("wasm", "a.py", r"\.wasm"), ("bin", "run.sh", "")):
        r = run(f"{kind} {algo}", ["-deliver", "oci-plain", "-algo-type", kind, "-algo-path", write(algo)])
        same(f"{kind} {algo}: status", r.status, 2)
        has(f"{kind} {algo}", r.err, "-algo-path", re.escape(algo), told)
    r = run("dataset", ["-deliver", "upload,oci", "-algo-type", "bin", "-algo-path", write("a"), "-data-paths", write("x.bin")])
    has("dataset x.bin", r.err, "-data-paths", r"x\.bin", r"\.csv")


def test_mistakes():
    base = ["-algo-type", "python", "-algo-path", W.algo, "-deliver", "oci"]
    for host in ("", "0.0.0.0", "::"):
        r = run(f"HOST={host}", base, {"HOST": host})
        same(f"HOST={host}: status", r.status, 2)
        has(f"HOST={host}", r.err, "HOST", "-deliver-host")
    r = run("nothing to deliver", ["-deliver", "oci", "-algo-source-url", "https://h/a", "-algo-kbs-path", "r/k/a"])
    has("nothing to deliver", r.err, "-deliver oci", "nothing to serve")


def test_mixed():
    """Each its way; dialects; TLS."""
    with serve("mixed", "oci-plain,upload") as s:
        r = Registry(s)
        same("mixed: the algorithm", r.files(r.name(r.algorithm)), {"algo.py": read(W.algo)})
        same("mixed: the dataset is uploaded", (first(r.datasets[0], 4), first(r.datasets[0], 3)), (b"", b"data.csv"))
    with serve("seed", "oci", "-compat", "seed") as s:
        r = Registry(s)
        same("seed: the broker is the computation's", (bool(first(first(r.algorithm, 6), 2, 0)), first(r.kbs, 1).decode(),
             bool(first(r.kbs, 2, 0))), (False, f"http://{s.address}", True))
        same("seed: files", r.files(r.name(r.algorithm), r.unwrap()), {"algo.py": read(W.algo)})
    with serve("head", "oci", "-compat", "head") as s:
        r = Registry(s)
        same("head: each has its broker", (first(first(r.algorithm, 6), 1).decode(), r.kbs), (f"http://{s.address}", b""))


def test_changed():
    """A layer whose file has changed is gone until an agent comes, whose manifest then names another image."""
    data = write("data.csv", b"old\n")
    with serve("changed", "oci-plain", base=["-algo-path", W.algo, "-data-paths", data]) as s:
        r = Registry(s)
        name = r.name(r.datasets[0], 4)
        digest = json.loads(r.get(f"/v2/{name}/manifests/latest")[2])["layers"][0]["digest"]
        write(data, b"new content\n")
        same("changed: the layer is gone", r.get(f"/v2/{name}/blobs/{digest}")[0], 410)
        now = Registry(s)
        other = now.name(now.datasets[0], 4)
        same("changed: another name", other == name, False)
        same("changed: files", now.files(other), {"data.csv": b"new content\n"})
        same("changed: hash", first(now.datasets[0], 1).hex(), sha3(b"new content\n"))
        same("changed: the old name is gone", r.get(f"/v2/{name}/manifests/latest")[0], 410)


def test_seen():
    """Lines, and what a verdict makes of them: the layer and its key count, manifests and configs do not."""
    with serve("seen", "oci", "-until", "complete", "-timeout", "60s", "-output", "json", base=["-algo-path", W.algo]) as s:
        r = Registry(s)
        r.unwrap()
        name = r.name(r.algorithm)
        r.image(name)
        s.out.need("/blobs/")
        seen = [json.loads(line)["request"] for line in s.out.text().splitlines() if '"request"' in line]
        same("seen: of what", [q.get("what", "").strip() for q in seen],
             ["key of the images", "manifest of the algorithm algo.py", "manifest of the algorithm algo.py",
              "config of the algorithm algo.py", "algorithm algo.py"][:len(seen)])
        same("seen: status", {q["status"] for q in seen}, {200})
        s.stop()
        has("seen: the summary", s.err.text(), "algorithm algo.py fetched", "and its key")


if __name__ == "__main__":
    W.make(sys.argv[1])
    sys.exit(harness.main(named(globals())))
