# SPDX-License-Identifier: Apache-2.0
"""The report as files: deterministic, signed, self-contained, escaped, and documented to the last key."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from aggregator.reporting import report, wording
from privacy.errors import MachineError, TrustError
from privacy.identity import keys
from tests.sample_report import COORDINATOR, contract, make, run, sample, seed

DOCUMENT = Path(__file__).parents[1] / "docs" / "reference" / "report.md"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>&\"'</style></title>"
VOID_TAGS = {"meta", "br", "img", "link"}

_KEYS = """
accounting.charged[].basis accounting.charged[].rounds accounting.charged[].version accounting.order
accounting.planned[].basis accounting.planned[].rounds rounds[].basis silos[].charged[].basis
accounting.planned[].version silos[].charged[].rounds silos[].charged[].version silos[].versions[] rounds[].version
versions[].digest versions[].event.dimension versions[].event.lattice_bits versions[].event.sampling_rate
versions[].event.share_variance versions[].event.shares versions[].event.steps versions[].event.type versions[].first_round
versions[].in_effect versions[].last_round versions[].members[] versions[].rounds versions[].version
accounting.event.dimension accounting.event.lattice_bits accounting.event.sampling_rate accounting.event.share_variance
accounting.event.shares accounting.event.steps accounting.event.type accounting.plan.epsilon accounting.plan.epsilon_pld
accounting.plan.epsilon_rdp accounting.plan.rounds accounting.plan.steps accounting.profile[].delta accounting.profile[].plan
accounting.profile[].spent accounting.spent.epsilon accounting.spent.epsilon_pld accounting.spent.epsilon_rdp
accounting.spent.rounds accounting.spent.steps aggregator_fingerprint assumptions[].id assumptions[].if_wrong
assumptions[].severity assumptions[].text burn_down[].epsilon burn_down[].epsilon_pld burn_down[].epsilon_rdp burn_down[].rounds
burn_down[].steps checks[].command checks[].shows checks[].where composition[] consents[] crosswalk[].evidence[] crosswalk[].id
crosswalk[].layer crosswalk[].residual crosswalk[].title crosswalk[].value extra.* federation.contract_digest
federation.expires federation.mode federation.model federation.model_digest federation.name federation.previous_digest
federation.state_digest federation.steps_per_round federation.version generated_at
guarantee.adversaries[].effective_noise_multiplier guarantee.adversaries[].name guarantee.adversaries[].plan.epsilon
guarantee.adversaries[].plan.epsilon_pld guarantee.adversaries[].plan.epsilon_rdp guarantee.adversaries[].plan.rounds
guarantee.adversaries[].plan.steps guarantee.adversaries[].shares guarantee.adversaries[].spent.epsilon
guarantee.adversaries[].spent.epsilon_pld guarantee.adversaries[].spent.epsilon_rdp guarantee.adversaries[].spent.rounds
guarantee.adversaries[].spent.steps guarantee.adversaries[].stood guarantee.adversaries[].who guarantee.delta
guarantee.odds[].false_positive_rate
guarantee.odds[].plan guarantee.odds[].spent guarantee.relation guarantee.several[].count guarantee.several[].of
guarantee.several[].plan guarantee.several[].spent guarantee.unit mechanism[].meaning mechanism[].name
mechanism[].symbol mechanism[].value rounds[].bytes_in rounds[].closed_at rounds[].kind rounds[].number rounds[].opened_at
rounds[].outcome_digest rounds[].participants[] rounds[].reason rounds[].state_digest rounds[].stood schema
silos[].fingerprint silos[].left
silos[].limit silos[].name silos[].organisation silos[].rounds_left silos[].silo silos[].spent.epsilon silos[].spent.epsilon_pld
silos[].spent.epsilon_rdp silos[].spent.rounds silos[].spent.steps software.* summary[] traffic.left[].form traffic.left[].reader
traffic.left[].what traffic.lora_bytes traffic.received_bytes traffic.stayed[] traffic.upload_bytes
accounting.plan.grid accounting.spent.grid burn_down[].grid guarantee.adversaries[].plan.grid guarantee.adversaries[].spent.grid
silos[].spent.grid versions[].delta versions[].epsilon versions[].seen[].basis versions[].seen[].name
versions[].seen[].event.dimension versions[].seen[].event.lattice_bits versions[].seen[].event.sampling_rate
versions[].seen[].event.share_variance versions[].seen[].event.shares versions[].seen[].event.steps versions[].seen[].event.type
"""
SCHEMA = _KEYS.split()


def paths(value: object, prefix: str = "") -> set[str]:
    """Every leaf of a JSON document as a dotted path; free maps as ``*``."""
    if isinstance(value, dict):
        free = prefix in {"software", "extra"}
        return set().union(*(paths(each, f"{prefix}.{'*' if free else key}".lstrip(".")) for key, each in value.items()))
    if isinstance(value, list):
        return set().union(*(paths(each, f"{prefix}[]") for each in value))
    return {prefix}


class Page(html.parser.HTMLParser):
    """What a page is made of; refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


def hostile_page() -> str:
    names = tuple((f"silo-{number}", HOSTILE.replace("\\", "").replace('"', "”") + str(number)) for number in range(3))
    accepted = contract(names=names, unit=HOSTILE.replace('"', "”"), model=HOSTILE.replace('"', "”"), rounds=1)
    rounds = (msgspec.structs.replace(run(1)[0], kind="void", reason=HOSTILE),)
    return report.render(make(accepted, rounds, software={HOSTILE: HOSTILE}, extra={HOSTILE: HOSTILE}))


# --- the record ----------------------------------------------------------------------------------------------------------


def test_the_keys_of_the_record_are_these_and_no_others():
    assert sorted(paths(msgspec.json.decode(report.encode(sample())))) == sorted(SCHEMA)


def test_every_key_of_the_record_is_documented():
    text = DOCUMENT.read_text(encoding="utf-8")
    for path in SCHEMA:
        for key in re.sub(r"\[\]|\.\*", "", path).split("."):
            assert f"`{key}`" in text, path


def test_equal_facts_give_equal_bytes_and_the_record_reads_back():
    accepted = contract(rounds=2)
    orders = ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    first, second = (report.encode(make(accepted, run(2), software=software)) for software in orders)
    assert first == second
    assert report.decode(first) == make(accepted, run(2), software={"a": "1", "b": "2"})
    assert first.endswith(b"}\n")
    assert b'"schema": "siloquy-report/2"' in first


@pytest.mark.parametrize("bad", [b"", b"{}", b"[1]", b"\xff", b'{"schema": "siloquy-report/1"}', b"[" * 100_000])
def test_what_is_no_report_is_refused(bad):
    with pytest.raises(TrustError, match="not a report"):
        report.decode(bad)


def test_another_spelling_of_a_report_is_refused():
    data = report.encode(sample())
    for other in (data + b"\n", data.replace(b"  ", b" "), data.replace(b'"generated_at"', b'"unknown": 1, "generated_at"')):
        with pytest.raises(TrustError):
            report.decode(other)


# --- the files -----------------------------------------------------------------------------------------------------------


NAMES = ["registry.yaml", "report.html", "report.json", "report.json.sig", "report.pdf"]


def test_a_record_its_signature_and_three_views(tmp_path):
    json_path, html_path = report.write(sample(), tmp_path / "new" / "folder", sign=COORDINATOR.sign)
    assert sorted(path.name for path in json_path.parent.iterdir()) == NAMES
    data = json_path.read_bytes()
    signature = (json_path.parent / "report.json.sig").read_text(encoding="ascii")
    assert re.fullmatch(r"[0-9a-f]{128}\n", signature)
    message = b"siloquy report\0" + hashlib.sha256(data).digest()
    keys.verify_signature(COORDINATOR.public.sign_key, message, bytes.fromhex(signature.strip()))
    with pytest.raises(TrustError):
        keys.verify_signature(COORDINATOR.public.sign_key, report.signing_input(data + b" "), bytes.fromhex(signature.strip()))
    digest = hashlib.sha256(data).hexdigest()
    assert digest in html_path.read_text(encoding="utf-8").replace(" ", "")
    assert report.decode(data) == sample()


def test_writing_again_changes_no_byte(tmp_path):
    first = {path.name: path.read_bytes() for path in report.write(sample(), tmp_path, sign=COORDINATOR.sign)}
    second = {path.name: path.read_bytes() for path in report.write(sample(), tmp_path, sign=COORDINATOR.sign)}
    assert first == second


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MachineError, match="cannot make the folder"):
        report.write(sample(), tmp_path / "file" / "folder", sign=COORDINATOR.sign)


def test_a_signer_that_fails_leaves_the_old_report_whole(tmp_path):
    def broken(_: bytes) -> bytes:
        raise MachineError("the key is on a token that is not here")

    report.write(sample(), tmp_path, sign=COORDINATOR.sign)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(MachineError):
        report.write(make(contract(rounds=1), run(1)), tmp_path, sign=broken)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- the page ------------------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained():
    text = report.render(sample())
    page = Page(text)
    assert not re.search(r"https?:|//|@import|url\(|javascript:|data:", text)
    for tag in ("script", "link", "img", "iframe", "form", "object", "embed"):
        assert page.named(tag) == []
    assert all(attrs["href"].startswith("#") for attrs in page.named("a"))
    assert not any(name.startswith("on") or name == "style" for _, attrs in page.tags for name in attrs)


def test_the_policy_allows_this_style_sheet_and_nothing_else():
    text = report.render(sample())
    policy = next(attrs["content"] for attrs in Page(text).named("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert text.count("<style") == 1


def test_tables_have_captions_and_every_heading_a_scope():
    text = report.render(sample())
    page = Page(text)
    assert len(page.named("table")) == len(page.named("caption")) > 8
    assert all(attrs.get("scope") in {"row", "col"} for attrs in page.named("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_ids_are_unique_and_every_reference_resolves():
    page = Page(report.render(sample()))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attrs.get(name, ids[0]) in ids
        assert attrs.get("href", f"#{ids[0]}")[1:] in ids


def test_charts_in_the_page_are_well_formed():
    pictures = re.findall(r"<svg.*?</svg>", report.render(sample()), re.DOTALL)
    assert len(pictures) == 3 + 2 + 2 + 1 + 2 + 1  # bars, crowds, burn-down wide and narrow, flow, bytes, strip
    assert all(ET.fromstring(picture).find("title") is not None for picture in pictures)


def test_the_page_shows_what_the_record_says():
    text = Page(report.render(sample())).text
    for silo in sample().silos:
        assert silo.organisation in text
        assert silo.fingerprint in text
        assert wording.up(silo.spent.epsilon_rdp) in text
    for sentence in (*sample().summary, *sample().composition, *sample().traffic.stayed):
        assert sentence in text
    for each in sample().assumptions:
        assert each.text in text
    assert "deadline: silo 3 absent" in text


def test_the_page_of_a_local_plan_says_what_a_round_is_there():
    text = report.render(make(contract(rounds=2, mode="local", steps_per_round=3), run(2)))
    assert "In each round every silo takes 3 steps of its own" in text
    assert "in local mode the silo’s own, for all three" in text
    assert "In each round every silo draws" not in text
    assert "against everyone" in Page(text).text


def test_hostile_names_are_escaped():
    text = hostile_page()
    page = Page(text)
    assert page.named("script") == page.named("img") == []
    assert "<script" not in text
    assert text.count("</style>") == 1
    assert "<script>alert(1)</script>" in page.text


def test_an_empty_run_and_a_passed_limit_render():
    empty = Page(report.render(make(contract(rounds=1), ()))).text
    assert "No round has been closed yet." in empty
    passed = report.render(make(contract(rounds=2, epsilon=0.1), run(2)))
    assert 'class="bar over"' in passed


def test_a_figure_that_was_not_computed_says_so():
    gone = msgspec.structs.replace(sample().accounting.spent, epsilon_pld=None)
    silos = tuple(msgspec.structs.replace(silo, spent=gone) for silo in sample().silos)
    without = msgspec.structs.replace(sample(), silos=silos, burn_down=(gone, gone))
    assert "not computed" in Page(report.render(without)).text


def test_free_values_are_shown_as_they_are():
    extra = {"kept": True, "nothing": None, "rate": 1e-6, "count": 12_000}
    text = Page(report.render(make(contract(rounds=1), (), extra=extra))).text
    for shown in ("True", "None", "10⁻⁶", "12,000"):
        assert shown in text
    assert seed("state").hex()[:8] in text
