# SPDX-License-Identifier: Apache-2.0
"""What a hostile review of contract versions, federations without noise and verify found; each test failed before its mend."""

from __future__ import annotations

import json
import shutil

import msgspec

from aggregator import commands, enrolment, planning, revision
from aggregator import verify as hub_verify
from aggregator.reporting import recheck, report
from cli import errors
from cli import silo as silo_cli
from privacy import envelope, federation, files
from privacy.audit import check_log, placing
from privacy.audit import whole as whole_audit
from privacy.audit.check_round import RoundFacts
from privacy.audit.findings import Findings, Slot
from privacy.messages import AGGREGATOR, EpochCall, encode
from silo import membership, succession
from silo import verify as silo_verify
from silo.home import Home
from silo.watch import Watch
from tests import test_verify, test_versions, test_without_privacy
from tests.sharing import share_terms
from tests.test_enrolment import with_terms
from tests.test_rotation import NAMES, Town
from tests.whole import Whole

original, whole = test_verify.original, test_verify.whole
finished, reported = test_without_privacy.finished, test_versions.reported


# --- silo verify ------------------------------------------------------------------------------------------------------------------


def test_a_silo_whose_ledger_is_gone_is_told_so(whole, capsys) -> None:
    """It took part, so it has a ledger: that none is there is a fault, and not an auditor without a home."""
    home = Home(whole.root / "silo-1")
    home.ledger_path.unlink()
    found = silo_verify.verify(home.root, folder=whole.home.root)
    assert ("ledger", "chain") in {(check.kind, check.what) for check in found.failed}, found.checks[-3:]
    assert errors.run(silo_cli.app, ["verify", "--home", str(home.root), "--folder", str(whole.home.root)]) == 4
    assert "ledger" in capsys.readouterr().out


def test_a_ledger_that_cannot_be_held_to_a_contract_is_open(whole) -> None:
    """The ledger says that this silo took part; without its contract nobody can say as whom."""
    home = Home(whole.root / "silo-1")
    shutil.rmtree(home.root / "contract")
    found = silo_verify.verify(home.root, folder=whole.home.root, fingerprint=whole.accepted.digest.hex())
    assert ("ledger", "chain") in {(check.kind, check.what) for check in found.open}, found.checks[-3:]


def test_an_outcome_that_this_silo_settled_and_nobody_shows_any_more_is_named(whole) -> None:
    """The board goes back to the middle of round 2: manifest and uploads are there, the outcome is not."""
    test_verify.sql(
        whole,
        "DELETE FROM documents WHERE number = 2 AND kind IN ('outcome', 'acknowledgement', 'certificate', 'consent', 'close')",
    )
    test_verify.sql(whole, "DELETE FROM documents WHERE number = 3")
    rows = {(row.kind, row.number): row.digest for row in hub_verify.rows_of(whole.home)}
    before = (whole.home.evidence_folder / rows["checkpoint", 2]).read_bytes()
    for head in (whole.home.log_folder / "checkpoint", Home(whole.root / "silo-1").log_folder / "head"):
        files.write_atomic(head, before)
    with test_verify.served(whole) as url:
        found = silo_verify.verify(whole.root / "silo-1", url=url)
    assert "own state" in {check.what for check in found.failed}, [check for check in found.checks if check.status != "ok"]


# --- A report held to the evidence ------------------------------------------------------------------------------------------------


def failed(whole, facts) -> set[str]:
    """What verify says against a report that its coordinator signed."""
    record = report.encode(facts)
    signature = whole.identity.sign(report.signing_input(record)).hex().encode()
    found = hub_verify.verify(whole.home.root, report=(record, signature))
    return {check.what for check in found.checks if check.status == "failed" and check.kind == "report"} - {"in the log"}


def test_a_report_without_privacy_is_made_again_as_a_whole(finished) -> None:
    facts = commands.build_report(finished.home.root)
    replace = msgspec.structs.replace
    assert failed(finished, facts) == set()
    assert failed(finished, replace(facts, warning="Noise of the network protects everybody.")) == {"NO_DIFFERENTIAL_PRIVACY"}
    assert failed(finished, replace(facts, summary=("No record can be found.", *facts.summary[1:]))) == {"summary[0]"}
    assert failed(finished, replace(facts, silos=facts.silos[:-1])) == {"silos.length"}
    other = replace(facts.silos[0], organisation="Somebody else")
    assert failed(finished, replace(facts, silos=(other, *facts.silos[1:]))) == {"silos[0].organisation"}
    sets = replace(facts.participation, least=30)
    assert failed(finished, replace(facts, participation=sets)) == {"participation.least"}


def test_another_release_excuses_sentences_only_and_leaves_them_open(reported) -> None:
    whole, _, facts = reported
    other = msgspec.structs.replace(
        facts, software={**facts.software, "siloquy": "9.9"}, summary=("Nobody can learn anything.", *facts.summary[1:])
    )
    _, asked = test_versions.verified(whole, other)
    assert asked["sentences"].status == "open", "whoever names another release may write anything there"
    last = msgspec.structs.replace(facts.rounds[-1], outcome_digest="ab" * 32)
    _, asked = test_versions.verified(whole, msgspec.structs.replace(other, rounds=(*facts.rounds[:-1], last)))
    assert asked[f"rounds[{len(facts.rounds) - 1}].outcome_digest"].status == "failed"
    silo = msgspec.structs.replace(facts.silos[0], organisation="Somebody else")
    _, asked = test_versions.verified(whole, msgspec.structs.replace(other, silos=(silo, *facts.silos[1:])))
    assert asked["silos[0].organisation"].status == "failed"


def test_another_schema_leaves_open_what_was_not_compared(reported) -> None:
    whole, _, facts = reported
    stated = json.loads(report.encode(facts))
    stated |= {"schema": "siloquy-report/9", "summary": ["Nobody can learn anything."]}
    _, asked = test_versions.verified(whole, json.dumps(stated).encode())
    assert asked["every figure"].status == "open"


def test_a_small_number_is_no_small_difference() -> None:
    """Deltas and rates are below one part in a million themselves."""
    assert list(recheck.differences({"delta": 1e-9}, {"delta": 9e-7})) == [("delta", 1e-9, 9e-7)]
    assert list(recheck.differences({"sampling_rate": 1e-7}, {"sampling_rate": 5e-7}))
    assert not list(recheck.differences({"left": 0.0, "epsilon": 1.0}, {"left": 1e-9, "epsilon": 1.0 + 1e-8}))


# --- The log, and the plan --------------------------------------------------------------------------------------------------------


def test_a_newer_version_must_be_in_the_log_too(tmp_path, monkeypatch) -> None:
    """A silo looks for the contract under which it works among the leaves, as it did for version 1 in the first head."""
    looked: set[tuple[tuple[str, int, int], bool]] = set()
    genuine = Watch._settle

    def settle(self, each, index, tiles, note):
        looked.add((each.slot, index is not None))
        genuine(self, each, index, tiles, note)

    monkeypatch.setattr(Watch, "_settle", settle)
    whole = Whole.create(tmp_path / "federation", training={"rounds": 4})
    whole.run(1)
    assert (("contract", 1, 0), True) in looked
    test_versions.succeed(whole, test_versions.tables(whole), expires='"2098-12-31"')
    whole.run(2)
    whole.close()
    assert (("contract", 2, 0), True) in looked


def test_a_plan_counts_the_shares_that_its_contract_would() -> None:
    """Of fewer than three silos no sum is ever opened, so two of four may be away and three shares still stand."""
    question = planning.Question(
        delta=1e-6, steps=5, sampling_rate=0.1, silos=4, units=100, dimension=10, noise_multiplier=2.0, dropouts=2
    )
    terms = federation.parse(share_terms(4, 5, dropouts=2)).terms
    assert (question.fewest, question.shares) == (terms.fewest, terms.shares) == (3, 2)


def test_one_round_in_full_says_no_epsilon_below_that_of_all(whole) -> None:
    """What the other rounds charged was not asked, so there is no figure after this one."""
    everything = hub_verify.verify(whole.home.root)
    alone = hub_verify.verify(whole.home.root, rounds=[2])
    assert everything.spent[-1].rounds_charged == 2
    said = {each.round: each.insiders for each in alone.spent}
    assert said in ({}, {each.round: each.insiders for each in everything.spent})


def test_the_contract_of_a_round_must_be_in_the_log(whole) -> None:
    """Whoever asks over the air has no table: the documents that a round rests on are looked for among the leaves."""
    evidence, fetch, _ = placing.offline(whole.home.root)
    leaves = {entry.slot: index for index, entry in enumerate(check_log.leaves(fetch))}
    walked: list[RoundFacts] = []
    whole_audit.audit(evidence, also=lambda found, versions, rounds: walked.extend(rounds))

    def failed_with(seen: dict[Slot, int]) -> list[Slot]:
        found = Findings(evidence)
        check_log._check_logged(found, walked, seen)
        return [check.slot for check in found.checks if check.status == "failed"]

    assert failed_with(leaves) == []
    contract = Slot("contract", 1, AGGREGATOR)
    assert failed_with({slot: index for slot, index in leaves.items() if slot != contract}) == [contract]


# --- A key that is another --------------------------------------------------------------------------------------------------------


def test_who_signs_is_told_whose_old_key_did_not_sign_for_the_new_one(tmp_path) -> None:
    """A coordinator that swaps a key must not look like a silo that rotated its own."""
    town = Town(tmp_path, *NAMES, terms=with_terms(noise_multiplier=9.0))
    town.sign()
    town.join(*NAMES)
    town.rotate("b")
    town.revise()
    revision.replace(town.home, "b", town.public("b"))
    town.sign()

    def words() -> str:
        home = town.silo("a")
        return "\n".join(succession.in_words(membership.fetch(town.line, succession.kept_pin(home), home=home)))

    assert "silo 2, b (b Hospital) has a new key" in words()
    assert (
        "the old key of b (2) has NOT signed for the new one: if it was lost or taken, call b Hospital before you agree" in words()
    )
    town.join("b")
    assert "the old key of b (2) signed for the new one" in words()
    assert "NOT" not in words()


def test_a_silo_that_came_later_waits_for_its_epoch(tmp_path) -> None:
    """The newest epoch is of version 1, which it never signed and never could: it has joined, and is not told to join."""
    town = Town(tmp_path, *NAMES, terms=with_terms(noise_multiplier=9.0))
    first = town.sign()
    town.join(*NAMES)
    town.begin("e")
    town.revise()
    enrolment.add_member(town.home, town.public("e"))
    second = town.sign()
    town.join(*NAMES, "e")
    call = encode(EpochCall(contract=first.digest, epoch=1))
    raw = envelope.sign(town.hub.under("ed25519"), type="epoch", context=first.digest, sender=AGGREGATOR, body=call)
    town.store.put_once("epoch", 1, AGGREGATOR, raw, received_at=1.0)
    assert succession.at_work(town.silo("e"), town.line)[0] == second
    assert succession.at_work(town.silo("a"), town.line)[0] == first
