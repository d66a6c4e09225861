#!/usr/bin/env python3
"""Images, as layouts on disk: tar, encryption, digests and annotations.  usage: test_image.py CVMS DRIVER [-v] [NAME...]

The judges are Python's tarfile, gzip and cryptography, and skopeo, where it is, for plain images."""
import base64
import gzip
import hashlib
import hmac
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import harness  # noqa: E402
from harness import W, has, named, need, read, same, temp, write  # noqa: E402

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: E402

KEY = bytes(range(32))
ANNOTATION = "org.opencontainers.image.enc."


class Image:
    """PATH as an image, by the driver, with every digest and size of its description checked."""
    def __init__(self, path, key=KEY, piece=65536):
        self.dir, self.key = temp(), key
        os.makedirs(os.path.join(self.dir, "blobs", "sha256"))
        p = subprocess.run([DRIVER, "image", key.hex() if key else "-", str(piece), path, self.dir], capture_output=True)
        self.name, digest, size = (p.stdout.decode(errors="replace").split() + ["", "", ""])[:3]
        need(p.returncode == 0, (p.returncode, p.stdout, p.stderr))
        self.manifest = json.loads(self.blob({"digest": digest, "size": int(size)}))
        self.config = json.loads(self.blob(self.manifest["config"]))
        self.layer = self.manifest["layers"][0]
        self.bytes = self.blob(self.layer)
        same("one layer", len(self.manifest["layers"]), 1)
        media = "application/vnd.oci.image.layer.v1.tar" + ("+gzip+encrypted" if key else "")
        same("types", [self.manifest["mediaType"], self.manifest["config"]["mediaType"], self.layer["mediaType"]],
             ["application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.config.v1+json", media])
        same("name", self.name, "algorithm-" + self.layer["digest"][7:23])
        self.tar = gzip.decompress(self.decrypted()) if key else self.bytes
        same("diff_id", self.config["rootfs"], {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(self.tar).hexdigest()]})
        with open(os.path.join(self.dir, "index.json"), "w") as f:
            json.dump({"schemaVersion": 2, "manifests": [{"mediaType": self.manifest["mediaType"], "digest": digest, "size": int(size),
                                                          "annotations": {"org.opencontainers.image.ref.name": "latest"}}]}, f)
        write(os.path.join(self.dir, "oci-layout"), '{"imageLayoutVersion":"1.0.0"}')

    def blob(self, described):
        data = read(os.path.join(self.dir, "blobs", "sha256", described["digest"][7:]))
        same("digest and size", ("sha256:" + hashlib.sha256(data).hexdigest(), len(data)), (described["digest"], described["size"]))
        return data

    def decrypted(self):
        options = json.loads(base64.b64decode(self.layer["annotations"][ANNOTATION + "pubopts"], validate=True))
        same("a wrapped key", bool(base64.b64decode(self.layer["annotations"][ANNOTATION + "keys.provider.attestation-agent"])), True)
        same("cipher", options["cipher"], "AES_256_CTR_HMAC_SHA256")
        same("mac", base64.b64decode(options["hmac"]), hmac.digest(self.key, self.bytes, "sha256"))
        self.nonce = base64.b64decode(options["cipheroptions"]["nonce"])
        c = Cipher(algorithms.AES(self.key), modes.CTR(self.nonce)).decryptor()
        return c.update(self.bytes) + c.finalize()

    def files(self):
        with tarfile.open(fileobj=io.BytesIO(self.tar)) as t:
            same("modes", {m.mode for m in t} - {0o755}, set())
            return {m.name: t.extractfile(m).read() for m in t}


def content(n):
    return hashlib.shake_128(str(n).encode()).digest(n)


def test_sizes():
    nonces = set()
    for n in (0, 1, 511, 512, 513, 65535 - 1536, 65535 - 1024, 65536, 131070 - 1536, 200001):
        for key in (KEY, None):
            image = Image(write("algo.py", content(n)), key)
            same(f"{n} bytes", image.files(), {"algo.py": content(n)})
            same(f"{n} bytes: two blocks of zeros", image.tar[-1024:], bytes(1024))
            same(f"{n} bytes: the tar's size", len(image.tar), 512 + (n + 511) // 512 * 512 + 1024)
            nonces.add(image.nonce if key else None)
    same("each layer has its nonce", len(nonces), 11)


def test_pieces():
    path = write("data.csv", content(70000))
    for piece in (1, 7, 16, 4095, 65536):
        for key in (KEY, None):
            same(f"in pieces of {piece}", Image(path, key, piece).files(), {"data.csv": content(70000)})


def test_folder():
    folder = temp()
    names = ["a.csv", "deep/er/b.csv", "ä.csv", "x" * 100, "y" * 101, "z" * 200, os.path.join("d" * 250, "e" * 250, "ü" * 120)]
    for name in names:
        write(os.path.join(folder, name), name)
    for key in (KEY, None):
        same("a folder", Image(folder, key).files(), {name: name.encode() for name in names})
    for n in (979, 980, 981, 989, 990, 991, 992):      # where the record of the name gets longer by a digit
        folder = temp()
        name = "/".join(["n" * 97] * 10)[:n]
        write(os.path.join(folder, name), b"x")
        same(f"a name of {n}", list(Image(folder, None).files()), [name])


def test_large():
    """The size of a file over 8 GiB, told by its header alone."""
    path = write("big.csv", b"")
    try:
        os.truncate(path, (8 << 30) + 5)
    except OSError:
        raise harness.Skip("the file system has no files of 8 GiB") from None
    p = subprocess.run([DRIVER, "header", path], capture_output=True)
    same("over 8 GiB", tarfile.TarInfo.frombuf(p.stdout[:512], "utf-8", "strict").size, (8 << 30) + 5)


def test_same_name():
    """Plain images of the same bytes have one name, of others another."""
    one, other = Image(write("a.py", b"1"), None), Image(write("a.py", b"2"), None)
    same("the same", Image(write("a.py", b"1"), None).name, one.name)
    same("another", one.name == other.name, False)
    same("entry point", Image(write('odd "name', b"1"), None).config["config"]["Entrypoint"], ['/odd "name'])


def test_skopeo():
    """Debian's has no key providers: it copies what is plain, and what is encrypted as it is."""
    if not shutil.which("skopeo"):
        raise harness.Skip("no skopeo; run tests/install.sh")
    for key in (KEY, None):
        image = Image(write("algo.py", content(5000)), key)
        to = os.path.join(temp(), "copy")
        p = subprocess.run(["skopeo", "copy", "--insecure-policy", f"oci:{image.dir}:latest", f"oci:{to}:latest"],
                           capture_output=True, text=True)
        same("skopeo copy", (p.returncode, p.stderr), (0, ""))
        index = json.loads(read(os.path.join(to, "index.json")))
        blob = lambda digest: read(os.path.join(to, "blobs", "sha256", digest[7:]))
        layer = json.loads(blob(index["manifests"][0]["digest"]))["layers"][0]
        if key:
            same("skopeo: the layer, and what is said of it", layer, image.layer)
        else:
            same("skopeo: the tar", gzip.decompress(blob(layer["digest"])), image.tar)
            has("skopeo: it compresses", layer["mediaType"], "gzip$")


if __name__ == "__main__":
    W.make(sys.argv[1])
    DRIVER = os.path.abspath(sys.argv[2])
    sys.exit(harness.main(named(globals()), skipped=3))
