# SPDX-License-Identifier: Apache-2.0
"""Test vectors that nobody here wrote, through this project's own entry points. Those for Ed25519 are in tests/test_keys.py.

``../shared/vectors`` holds transparency-dev/merkle testdata, C2SP/CCTV and C2SP/wycheproof; HPKE's come from PyPI.
"""

from __future__ import annotations

import base64
import collections
import hmac
import json
from pathlib import Path

import cryptography_vectors
import pytest
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

from privacy import envelope
from privacy.errors import TrustError
from privacy.identity import curve25519, keys, signatures
from privacy.transparency import notes, proofs, tree
from privacy.transparency.notes import VerifierKey

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"
HPKE_VECTORS = Path(cryptography_vectors.__file__).parent / "HPKE" / "hpke-pq-test-vectors.json"


def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (VECTORS / folder).is_dir(), reason=f"../shared/vectors/{folder} is not beside the project")


def wycheproof(name: str):
    """(group, case) of a file, and how many of each result there are."""
    groups = json.loads((VECTORS / "wycheproof" / f"{name}_test.json").read_text())["testGroups"]
    return [(group, case) for group in groups for case in group["tests"]]


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


# --- Merkle proofs -----------------------------------------------------------------------------------------------------


def merkle_cases():
    folder = VECTORS / "merkle" / "testdata"
    return [(path.relative_to(folder), json.loads(path.read_text())) for path in sorted(folder.rglob("*.json"))]


def check_merkle(kind: str, case) -> None:
    decoded = {name: base64.b64decode(case[name]) for name in ("root", "leafHash", "root1", "root2") if case.get(name)}
    proof = [base64.b64decode(each) for each in case["proof"] or []]
    get = lambda name: decoded.get(name, b"")  # noqa: E731
    if kind == "inclusion":
        proofs.verify_inclusion(get("leafHash"), case["leafIdx"], case["treeSize"], proof, get("root"))
    elif kind == "consistency":
        proofs.verify_consistency(case["size1"], get("root1"), case["size2"], get("root2"), proof)
    elif kind == "subtreeinclusion":
        tree.verify_subtree_inclusion(get("leafHash"), case["leafIdx"], case["start"], case["end"], proof, get("root"))
    else:
        tree.verify_subtree_consistency(case["start"], case["end"], case["size"], proof, get("root1"), get("root2"))


@needs("merkle")
def test_all_518_merkle_proofs() -> None:
    """Every hostile proof is refused, every good one verifies. Ours are stricter in eight: a root must be a hash, and of an empty
    subtree nothing is proved (the reference returns there without looking at the tree's root)."""
    results, stricter = collections.Counter(), []
    cases = merkle_cases()
    assert len(cases) == 518
    for path, case in cases:
        kind = path.parts[0]
        try:
            check_merkle(kind, case)
            refused = False
        except TrustError:
            refused = True
        results[kind, case["wantErr"], refused] += 1
        if refused and not case["wantErr"]:
            stricter.append(case)
    assert results == {
        ("inclusion", True, True): 92, ("inclusion", False, False): 6,
        ("consistency", True, True): 92, ("consistency", False, False): 5, ("consistency", False, True): 1,
        ("subtreeinclusion", True, True): 192, ("subtreeinclusion", False, False): 12,
        ("subtreeconsistency", True, True): 106, ("subtreeconsistency", False, False): 5, ("subtreeconsistency", False, True): 7,
    }  # fmt: skip
    for case in stricter:
        no_hash = {len(base64.b64decode(case[name])) for name in ("root1", "root2")} != {32}
        assert no_hash or case["start"] == case["end"], case


# --- X25519, HKDF ------------------------------------------------------------------------------------------------------


@needs("wycheproof")
def test_x25519_keys_that_give_zero_or_have_another_spelling_are_refused() -> None:
    """A key that passes gives the vector's secret; one that is refused is flagged as twisted, non-canonical or of low order."""
    results = collections.Counter()
    for _, case in wycheproof("x25519"):
        public, flags = unhex(case["public"]), set(case["flags"])
        try:
            curve25519.check_dh_key(public)
        except TrustError:
            results["refused"] += 1
            assert flags & {"LowOrderPublic", "NonCanonicalPublic", "ZeroSharedSecret", "SmallPublicKey"}, case
            continue
        results["passed"] += 1
        assert "ZeroSharedSecret" not in flags
        shared = x25519.X25519PrivateKey.from_private_bytes(unhex(case["private"])).exchange(
            x25519.X25519PublicKey.from_public_bytes(public)
        )
        assert shared == unhex(case["shared"])
    assert sum(results.values()) == 518
    assert results["refused"] > 10


@needs("wycheproof")
def test_hkdf_extract_and_expand() -> None:
    """Ours are fixed to 32 bytes of output and a labelled info; the rest of the expansion is done here by hand (RFC 5869 §2.3)."""
    checked = 0
    for _, case in wycheproof("hkdf_sha256"):
        if case["result"] != "valid":
            assert case["size"] > 255 * 32
            continue
        prk, info, made = keys.extract(unhex(case["salt"]), unhex(case["ikm"])), unhex(case["info"]), b""
        block, counter = b"", 0
        while len(made) < case["size"]:
            counter += 1
            block = hmac.digest(prk, block + info + bytes([counter]), "sha256")
            made += block
        assert made[: case["size"]] == unhex(case["okm"])
        label, separator, context = info.partition(b"\0")
        if separator and label.isascii():
            assert keys.expand(prk, label.decode(), context) == hmac.digest(prk, info + b"\1", "sha256")
        checked += 1
    assert checked > 70
    prk = bytes(range(32))
    assert keys.expand(prk, "gsum/1 next", b"context") == hmac.digest(prk, b"gsum/1 next\0context\1", "sha256")


# --- ML-KEM, ML-DSA ----------------------------------------------------------------------------------------------------


@needs("wycheproof")
def test_ml_kem_768_keys_in_our_seal_keys() -> None:
    """The lattice half of a seal key: unreduced keys are refused, good ones pass and decapsulate to the vector's secret."""
    curve_half = x25519.X25519PrivateKey.from_private_bytes(bytes(range(32))).public_key().public_bytes_raw()
    results = collections.Counter()
    for group, case in wycheproof("mlkem_768"):
        if group["type"] == "MLKEMTest":
            results["decapsulated", case["result"]] += 1
            check_decapsulation(case, curve_half)
        elif "ek" in case:
            try:
                keys.load_seal_key(unhex(case["ek"]) + curve_half)
                refused = False
            except TrustError:
                refused = True
            results["key", case["result"]] += 1
            assert refused == (case["result"] == "invalid"), case
    assert sum(results.values()) > 100
    assert results["decapsulated", "valid"] > 10


def check_decapsulation(case, curve_half: bytes) -> None:
    if case["result"] != "valid":
        with pytest.raises(ValueError):
            mlkem.MLKEM768PrivateKey.from_seed_bytes(unhex(case["seed"])).decapsulate(unhex(case["c"]))
        return
    private = mlkem.MLKEM768PrivateKey.from_seed_bytes(unhex(case["seed"]))
    assert private.public_key().public_bytes_raw() == unhex(case["ek"])
    keys.load_seal_key(unhex(case["ek"]) + curve_half)
    assert private.decapsulate(unhex(case["c"])) == unhex(case["K"])


@needs("wycheproof")
def test_ml_dsa_65_signatures_as_the_second_half_of_ours() -> None:
    """Beside a good Ed25519 half, the composite signature verifies exactly when the vector's does (contexts are not used here)."""
    seed = bytes(range(32))
    curve_key = signatures.public_key(seed, None)
    results = collections.Counter()
    for group, case in wycheproof("mldsa_65_verify"):
        message, lattice = unhex(case["msg"]), unhex(case["sig"])
        wanted = "invalid" if case.get("ctx") else case["result"]  # signed for a context, it is another message without one
        signature = signatures.sign(message, sign_seed=seed, ml_dsa_seed=None) + lattice
        try:
            signatures.verify_signature(curve_key + unhex(group["publicKey"]), message, signature)
            found = "valid"
        except TrustError:
            found = "invalid"
        assert found == wanted, case["comment"]
        results[found] += 1
    assert sum(results.values()) == 210
    assert min(results.values()) > 10


# --- HPKE --------------------------------------------------------------------------------------------------------------


def test_hpke_base_mode_with_x_wing() -> None:
    """The published vectors for our KEM: the key made from the seed is theirs, and what is sealed to it opens through our door."""
    vectors = [each for each in json.loads(HPKE_VECTORS.read_text()) if each["kem_id"] == 0x647A and each["mode"] == 0]
    assert len(vectors) == 2
    for vector in vectors:
        seed, info = unhex(vector["skRm"]), unhex(vector["info"])
        assert keys.seal_public_key(seed) == unhex(vector["pkRm"])
        keys.load_seal_key(unhex(vector["pkRm"]))
        assert envelope.open_sealed(seed, envelope.seal(unhex(vector["pkRm"]), b"text", info=info), info=info) == b"text"
        # Theirs use another cipher or key derivation (tests/test_keys.py opens one in its own suite): our one suite refuses them.
        with pytest.raises(TrustError):
            envelope.open_sealed(seed, unhex(vector["enc"] + vector["encryptions"][0]["ct"]), info=info)


# --- CCTV --------------------------------------------------------------------------------------------------------------


@needs("cctv")
def test_no_weak_key_of_cctv_signs_anything_here() -> None:
    """Through every door: as identity key, and as the key of a note."""
    flagged = 0
    for vector in json.loads((VECTORS / "cctv" / "ed25519vectors.json").read_text()):
        key = unhex(vector["key"])
        if not {"low_order_A", "non_canonical_A"} & set(vector["flags"] or []):
            continue
        flagged += 1
        for check in (lambda k=key: keys.check_sign_key(k), lambda k=key: signatures.check_verify_key(k)):
            with pytest.raises(TrustError):
                check()
        message, signature = vector["msg"].encode(), unhex(vector["sig"])
        for verify in (curve25519.verify_signature, signatures.verify_signature):
            with pytest.raises(TrustError):
                verify(key, message, signature)
        known = VerifierKey(name="a", key=key)
        note = notes.Note(text=vector["msg"] + "\n", lines=(notes.Line(name="a", key_id=known.id, signature=signature),))
        with pytest.raises(TrustError):
            notes.verified(note, [known])
    assert flagged == 526
