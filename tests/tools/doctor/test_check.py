from dist_pca.tools.doctor.check import Check, merge


def test_what_all_ranks_found_alike_is_said_once() -> None:
    alike = [Check("versions", "pass", "torch 2.6")]
    assert merge([alike, alike, alike], ["a", "a", "b"]) == alike


def test_the_worst_verdict_counts_and_its_ranks_and_hosts_are_named() -> None:
    fine, full = Check("disk", "pass", "90 GB free"), Check("disk", "fail", "0.1 GB free", "make space")
    (merged,) = merge([[fine], [full], [full]], ["a", "b", "b"])
    assert merged.verdict == "fail"
    assert merged.found == "ranks 1, 2 on b: 0.1 GB free"
    assert merged.remedy == "make space"


def test_ranks_with_other_versions_are_all_named() -> None:
    by_rank = [[Check("versions", "pass", f"torch 2.{minor}")] for minor in (6, 6, 7)]
    (merged,) = merge(by_rank, ["a", "a", "b"])
    assert merged.verdict == "fail"
    assert "ranks 0, 1 on a: torch 2.6; rank 2 on b: torch 2.7" in merged.found
    assert merged.remedy


def test_passing_checks_that_differ_pass() -> None:
    by_rank = [[Check("disk", "pass", text)] for text in ("90 GB free", "80 GB free")]
    (merged,) = merge(by_rank, ["a", "b"])
    assert merged.verdict == "pass"
    assert "80 GB" in merged.found
