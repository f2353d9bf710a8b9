# SPDX-License-Identifier: Apache-2.0
"""privacy.identity.keys and privacy.identity.curve25519: identities, their files, and the keys that must be refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import cryptography_vectors
import pytest
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import ConfigError, TrustError
from privacy.identity import keys
from privacy.identity.curve25519 import check_dh_key, check_sign_key, verify_signature

FIELD = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
VECTORS = Path(__file__).parents[2] / "shared" / "vectors"
HPKE_VECTORS = Path(cryptography_vectors.__file__).parent / "HPKE" / "hpke-pq-test-vectors.json"



def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (VECTORS / folder).is_dir(), reason=f"../shared/vectors/{folder} is not beside the project")


def refuses(key: bytes) -> bool:
    try:
        check_sign_key(key)
    except TrustError:
        return True
    return False


# --- Ed25519 keys -----------------------------------------------------------------------------------------------------


@needs("cctv")
def test_every_low_order_or_non_canonical_key_of_cctv_is_refused() -> None:
    vectors = json.loads((VECTORS / "cctv" / "ed25519vectors.json").read_text())
    flags = {"low_order_A", "non_canonical_A", "low_order_component_A"}
    bad = {vector["key"] for vector in vectors if flags & set(vector["flags"] or [])}
    good = {vector["key"] for vector in vectors if not flags & set(vector["flags"] or [])}
    assert len(vectors) == 914
    assert bad
    assert good
    assert all(refuses(bytes.fromhex(key)) for key in bad)
    assert not any(refuses(bytes.fromhex(key)) for key in good)


@needs("cctv")
def test_of_cctv_signatures_only_those_with_a_fit_key_and_canonical_r_pass() -> None:
    """A small-order R alone is harmless: only the key's holder can make such a signature verify."""
    passed = []
    for vector in json.loads((VECTORS / "cctv" / "ed25519vectors.json").read_text()):
        try:
            verify_signature(bytes.fromhex(vector["key"]), vector["msg"].encode(), bytes.fromhex(vector["sig"]))
        except TrustError:
            continue
        passed.append(vector["flags"] or [])
    assert sorted(passed) == [[], ["low_order_R"]]


@needs("wycheproof")
def test_agrees_with_wycheproof() -> None:
    (path,) = (VECTORS / "wycheproof").rglob("ed25519_test.json")
    for group in json.loads(path.read_text())["testGroups"]:
        key = bytes.fromhex(group["publicKey"]["pk"])
        for case in group["tests"]:
            try:
                verify_signature(key, bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"]))
                verdict = "valid"
            except TrustError:
                verdict = "invalid"
            assert verdict == case["result"], case["comment"]


def test_the_identity_point_that_signs_everything_is_refused() -> None:
    key, signature = b"\1" + bytes(31), b"\1" + bytes(63)
    Ed25519PublicKey.from_public_bytes(key).verify(signature, b"anything")  # the library's word: the trap is real
    with pytest.raises(TrustError, match="prime order"):
        verify_signature(key, b"anything", signature)


@pytest.mark.parametrize("text", [
    "00" * 32,  # order 4
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",  # order 2: y = -1
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",  # order 8
    "01000000000000000000000000000000" + "00" * 15 + "80",  # x = 0 with the sign bit
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",  # y = p
    "02" + "00" * 31,  # no point
    "", "00" * 31, "00" * 33,
])  # fmt: skip
def test_small_order_and_malformed_keys_are_refused(text: str) -> None:
    assert refuses(bytes.fromhex(text))


@settings(max_examples=25, deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_every_generated_key_passes(seed: bytes) -> None:
    check_sign_key(Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw())


def test_s_and_s_plus_order_are_not_both_accepted() -> None:
    private = Ed25519PrivateKey.from_private_bytes(bytes(32))
    key, signature = private.public_key().public_bytes_raw(), private.sign(b"m")
    verify_signature(key, b"m", signature)
    raised = (int.from_bytes(signature[32:], "little") + ORDER).to_bytes(32, "little")
    with pytest.raises(TrustError):
        verify_signature(key, b"m", signature[:32] + raised)


def test_every_flipped_bit_of_a_signature_is_refused() -> None:
    private = Ed25519PrivateKey.from_private_bytes(bytes(32))
    key, signature = private.public_key().public_bytes_raw(), private.sign(b"m")
    for bit in range(512):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TrustError):
            verify_signature(key, b"m", bytes(changed))
    for cut in (b"", signature[:-1], signature + b"\0"):
        with pytest.raises(TrustError):
            verify_signature(key, b"m", cut)


# --- X25519 and X-Wing keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [
    0, 1, FIELD - 1, FIELD, FIELD + 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
])  # fmt: skip
def test_low_order_and_non_canonical_x25519_keys_are_refused(number: int) -> None:
    with pytest.raises(TrustError):
        check_dh_key(number.to_bytes(32, "little"))


def test_x25519_keys_have_one_spelling() -> None:
    key = X25519PrivateKey.from_private_bytes(bytes(range(32))).public_key().public_bytes_raw()
    check_dh_key(key)
    for other in (key[:31] + bytes([key[31] | 0x80]), key[:-1], key + b"\0", b""):
        with pytest.raises(TrustError):
            check_dh_key(other)


def test_seal_keys_match_the_hpke_vectors() -> None:
    vectors = [vector for vector in json.loads(HPKE_VECTORS.read_text()) if vector["kem_id"] == 0x647A and vector["mode"] == 0]
    assert len(vectors) == 2
    for vector in vectors:
        assert keys.seal_public_key(bytes.fromhex(vector["skRm"])) == bytes.fromhex(vector["pkRm"])
    (vector,) = [vector for vector in vectors if vector["kdf_id"] == 1]
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
    first = vector["encryptions"][0]
    sealed, private = bytes.fromhex(vector["enc"] + first["ct"]), keys.load_seal_seed(bytes.fromhex(vector["skRm"]))
    # Only the library's own tests can set an aad; the product never does (it is bound through info).
    opened = openssl.hpke._decrypt_with_aad(suite, sealed, private, bytes.fromhex(vector["info"]), bytes.fromhex(first["aad"]))
    assert opened == bytes.fromhex(first["pt"])


def test_unfit_seal_keys_are_refused() -> None:
    good = keys.seal_public_key(bytes(32))
    assert len(good) == 1216
    keys.load_seal_key(good)
    unreduced, low_order = b"\xff" * 1184 + good[1184:], good[:1184] + bytes(32)
    for bad in (b"", good[:-1], good + b"\0", unreduced, low_order):
        with pytest.raises(TrustError):
            keys.load_seal_key(bad)


# --- the private file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("receives", [False, True])
def test_an_identity_is_what_was_created(tmp_path: Path, receives: bool) -> None:
    path = tmp_path / "silo.key"
    made = keys.create(path, name="hospital-a", receives=receives)
    assert keys.load(path) == made
    assert path.stat().st_mode & 0o777 == 0o600
    assert (made.public.seal_key is not None) is receives
    assert f"# sign key: {made.public.sign_key.hex()}" in path.read_text()
    assert keys.fingerprint(made.public) in path.read_text()


def test_two_identities_differ(tmp_path: Path) -> None:
    first, second = (keys.create(tmp_path / name, name="a", receives=True) for name in ("1.key", "2.key"))
    assert first.public.sign_key != second.public.sign_key
    assert first.public.seal_key != second.public.seal_key


def test_an_identity_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "silo.key"
    keys.create(path, name="a", receives=False)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        keys.create(path, name="b", receives=False)
    (tmp_path / "link.key").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists"):
        keys.create(tmp_path / "link.key", name="b", receives=False)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.key", "silo.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o660])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "silo.key"
    keys.create(path, name="a", receives=False)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"{mode:04o}"):
        keys.load(path)


def test_a_missing_identity_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        keys.load(tmp_path / "silo.key")
    with pytest.raises(ConfigError):
        keys.load(tmp_path)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("siloquy-key/1", "siloquy-key/2"),
    lambda text: text + 'more = "x"\n',
    lambda text: text.replace('name = "a"', 'name = "A"'),
    lambda text: text.replace('name = "a"', 'name = "a\\n"'),
    lambda text: text.replace("sign_seed", "seed"),
    lambda text: text[:-20],
    lambda text: "\0" + text,
    lambda text: text.replace('sign_seed = "', 'sign_seed = " '),
    lambda text: text.replace('sign_seed = "', 'sign_seed = "00'),
    lambda text: "",
])  # fmt: skip
def test_a_malformed_key_file_is_refused_without_showing_it(tmp_path: Path, change) -> None:
    path = tmp_path / "silo.key"
    identity = keys.create(path, name="a", receives=False)
    path.write_text(change(path.read_text()))
    with pytest.raises(ConfigError, match="not an identity file") as caught:
        keys.load(path)
    assert identity.sign_seed.hex()[:8] not in repr(caught.value.as_json())
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a\n", "ä", "a" * 64, "a/b"])
def test_odd_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="not a name"):
        keys.create(tmp_path / "silo.key", name=name, receives=False)
    assert not list(tmp_path.iterdir())


def test_no_repr_shows_a_secret() -> None:
    identity = keys.Identity(name="a", sign_seed=os.urandom(32), receive_seed=os.urandom(32))
    for text in (repr(identity), str(identity), f"{identity!r}"):
        assert "a" in text
        for secret in (identity.sign_seed, identity.receive_seed):
            assert secret.hex() not in text
            assert repr(secret)[2:-1] not in text


# --- fingerprints, public files ---------------------------------------------------------------------------------------


def test_a_fingerprint_covers_name_and_both_keys() -> None:
    base = keys.PublicIdentity(name="a", sign_key=bytes(32), seal_key=bytes(1216))
    others = [
        keys.PublicIdentity(name="b", sign_key=bytes(32), seal_key=bytes(1216)),
        keys.PublicIdentity(name="a", sign_key=b"\1" + bytes(31), seal_key=bytes(1216)),
        keys.PublicIdentity(name="a", sign_key=bytes(32), seal_key=b"\1" + bytes(1215)),
        keys.PublicIdentity(name="a", sign_key=bytes(32)),
    ]
    prints = {keys.fingerprint(public) for public in [base, *others]}
    assert len(prints) == 5
    assert all(len(text.split()) == 16 and {len(group) for group in text.split()} == {4} for text in prints)


@pytest.fixture
def public_file(tmp_path: Path) -> tuple[bytes, keys.Identity]:
    identity = keys.create(tmp_path / "hub.key", name="hub", receives=True)
    keys.write_public(tmp_path / "identity.pub", identity, 'Krankenhaus "Süd" \\ Köln')
    return (tmp_path / "identity.pub").read_bytes(), identity


def test_a_public_file_says_who_and_proves_possession(public_file: tuple[bytes, keys.Identity]) -> None:
    raw, identity = public_file
    member = keys.read_public(raw)
    assert (member.name, member.organisation) == ("hub", 'Krankenhaus "Süd" \\ Köln')
    assert (member.sign_key, member.seal_key) == (identity.public.sign_key, identity.public.seal_key)
    assert keys.fingerprint(member) == keys.fingerprint(identity.public)
    assert identity.sign_seed.hex() not in raw.decode()


def test_a_changed_public_file_is_refused(public_file: tuple[bytes, keys.Identity]) -> None:
    raw, _ = public_file
    for place in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[place] ^= 1
        with pytest.raises(TrustError):
            keys.read_public(bytes(changed))
    for other in (b"", raw[:-1], raw + b"\n", raw + raw, b"\n" + raw, raw.replace(b"\n", b"\r\n"), raw + b"#" * 20000):
        with pytest.raises(TrustError):
            keys.read_public(other)


def test_a_key_of_somebody_else_cannot_be_introduced(public_file: tuple[bytes, keys.Identity]) -> None:
    raw, identity = public_file
    thief = keys.Identity(name="hub", sign_seed=bytes(32))
    body = raw[: raw.rindex(b"signature")]
    forged = thief.sign(keys.signing_input(type="identity", context=keys.NO_CONTEXT, sender=0, body=body))
    with pytest.raises(TrustError, match=identity.public.sign_key.hex()[:16]):
        keys.read_public(body + f'signature = "{forged.hex()}"\n'.encode())


@pytest.mark.parametrize("organisation", ["", "a\nb", "a\u202eb", "x" * 201, "\x1b[2J"])
def test_an_organisation_that_does_not_print_is_refused(tmp_path: Path, organisation: str) -> None:
    with pytest.raises(ConfigError, match="printable"):
        keys.write_public(tmp_path / "identity.pub", keys.Identity(name="a", sign_seed=bytes(32)), organisation)


# --- derivation -------------------------------------------------------------------------------------------------------


def test_signing_input_is_the_documented_bytes() -> None:
    made = keys.signing_input(type="header", context=b"c" * 32, sender=7, body=b"body")
    assert made == b"gsum/1 sig header\0" + b"c" * 32 + b"\0\0\0\7" + hashlib.sha256(b"body").digest()
    with pytest.raises(TrustError, match="32 bytes"):
        keys.signing_input(type="header", context=b"", sender=7, body=b"body")


def test_hkdf_matches_rfc_5869_case_1() -> None:
    prk = keys.extract(bytes(range(13)), b"\x0b" * 22)
    assert prk.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"


def test_expand_is_hkdf_expand_of_label_nul_context() -> None:
    import hmac

    assert keys.expand(b"k" * 32, "gsum/1 x", b"a", b"b") == hmac.digest(b"k" * 32, b"gsum/1 x\0ab\1", "sha256")


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_derivation_key_has_one_length(size: int) -> None:
    """HMAC pads its key with zeros: k and k ‖ 0 are one key to it, so another length is refused, not padded."""
    with pytest.raises(TrustError, match="32 bytes"):
        keys.expand(bytes(size), "gsum/1 x")
