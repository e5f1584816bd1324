"""What two runs over the demo model's evaluation set may differ by, and the report of it."""
import numpy as np

from outputs import compare

LEAST_SAME_TOP1 = 0.975
LEAST_SAME_TOP1_ANSWERS = 0.993
LARGEST_LOSS_CHANGE = 0.01
LARGEST_RECITATION_CHANGE = 4


def check_greedy(reference, candidate, parted):
    """What is known of each place where two greedy texts part. reference and candidate: runs over
    the ids up to there.

    The bound: both pick their best token, so with r the reference's and c the candidate's token and
    e the largest difference of a logit,
        reference[r] - reference[c] <= (reference[r] - candidate[r]) + (candidate[c] - reference[c])
    is at most 2 e. The candidate's text comes from prefill, decode steps and the sampler on the
    device, its logits here from forced tokens. So the check fails when those disagree: when the
    token is not the best, or the cache does not hold what it should."""
    ends = np.cumsum([len(ids) for _, ids, _, _ in parted]) - 1
    results = []
    for (index, _, reference_token, token), end in zip(parted, ends):
        a = np.array(reference.logits[end], np.float64)
        b = np.array(candidate.logits[end], np.float64)
        results.append({
            "recitation": index,
            "gap": float(a.max() - a[token]),
            "bound": float(2 * np.abs(a - b).max()),
            "is_best_when_forced": bool(b.argmax() == token),
            "reference_is_best_when_forced": bool(a.argmax() == reference_token)})
    return results


def report_on(evals, reference, candidate, parted_results):
    report = compare(reference, candidate, evals.next_ids, evals.is_answer)
    report["recited"] = {"reference": sum(evals.is_recited(reference)),
                         "got": sum(evals.is_recited(candidate)), "of": len(evals.prompts)}
    report["greedy_texts_that_differ"] = len(parted_results)
    report["first_differences"] = parted_results
    return report


def failures_of(report):
    """What the checks find wrong, one line each."""
    recited = report["recited"]
    checks = [
        (report["same_top1"] >= LEAST_SAME_TOP1,
         f"same top-1 at {report['same_top1']:.2%} of all positions, allowed {LEAST_SAME_TOP1:.1%}"),
        (report["same_top1_answers"] >= LEAST_SAME_TOP1_ANSWERS,
         f"same top-1 at {report['same_top1_answers']:.2%} of the answers' tokens, allowed "
         f"{LEAST_SAME_TOP1_ANSWERS:.1%}"),
        (abs(report["loss_ratio"] - 1) <= LARGEST_LOSS_CHANGE,
         f"loss {report['loss']:.4f} against {report['reference_loss']:.4f}, allowed 1 % apart"),
        (abs(recited["got"] - recited["reference"]) <= LARGEST_RECITATION_CHANGE,
         f"{recited['got']} poems recited against {recited['reference']}, allowed 4 apart"),
    ]
    for place in report["first_differences"]:
        checks.append((place["gap"] <= place["bound"] and place["is_best_when_forced"],
                       f"recitation {place['recitation']}: {place}"))
    return [message for passed, message in checks if not passed]


def print_report(name, report):
    difference = report["largest_difference"]
    gaps = [place["gap"] for place in report["first_differences"]]
    bounds = [place["bound"] for place in report["first_differences"]]
    print(f"\n{name}")
    print(f"  same top-1, all positions   {report['same_top1']:8.2%} of {report['positions']}")
    print(f"  same top-1, answers' tokens {report['same_top1_answers']:8.2%} of "
          f"{report['answer_tokens']}")
    print(f"  loss of the answers         {report['loss']:8.5f} against "
          f"{report['reference_loss']:.5f} ({report['loss_ratio'] - 1:+.3%})")
    print(f"  logit differences           rms {report['rms_difference']:.4f}; largest of a position: "
          f"median {difference['median_position']:.4f}, 99 % {difference['99th_percentile']:.4f}, "
          f"worst {difference['worst_position']:.4f}")
    print(f"  recited right               {report['recited']['got']} against "
          f"{report['recited']['reference']} of {report['recited']['of']}")
    print(f"  greedy texts that differ    {report['greedy_texts_that_differ']}" + (
        f"; at the first difference the token's gap to the best is at most {max(gaps):.4f}, and "
        f"{max(g / b for g, b in zip(gaps, bounds)):.0%} of its bound" if gaps else ""))
