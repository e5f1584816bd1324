"""Token ids to run a model over, and comparison of what two runs of the same ids computed.

A run is a directory as tests/accuracy/model_outputs writes it: logits.f32 and outputs.json.
"""
import datetime
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

BEGIN, TURN = "<|begin_of_sentence|>", "<|end_of_sentence|>"
STOP_ID = 2
GREEDY_TOKENS = 160
BYTES_OF_FLOAT = 4
COMPARED_LOGITS = 1 << 20  # at once: arrays that the heap keeps, not fresh pages each time


ROOT = pathlib.Path(__file__).resolve().parents[2]


def find_program():
    """model_outputs of an unpacked bundle (tools/bundle --gpu-tests), or of the build."""
    bundled = ROOT / "tests/model_outputs"
    return bundled if bundled.exists() else ROOT / "build/cuda/tests/model_outputs"


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def chat_tokens(tokenizer, messages):
    """Ids of a finished chat, and which of them belong to an answer. A segment is encoded on its own
    wherever an answer begins or ends; the last answer ends with </s>."""
    ids, is_answer, text = [], [], BEGIN
    for index, message in enumerate(messages):
        if message["role"] == "system":
            text += message["content"] + "\n"
        elif message["role"] == "user":
            text += f"User: {message['content']}\nAssistant: "
        else:
            before, answer = tokenizer.encode(text), tokenizer.encode(message["content"])
            answer += [STOP_ID] * (index == len(messages) - 1)
            ids += before + answer
            is_answer += [False] * len(before) + [True] * len(answer)
            text = TURN
    return ids, np.array(is_answer)


class EvalSet:
    """Chats to force, with the answer's tokens marked, and prompts to recite after."""

    def __init__(self, model_dir, eval_dir, num_chats, num_recitations):
        import sentencepiece
        self.tokenizer = sentencepiece.SentencePieceProcessor(
            model_file=os.path.join(model_dir, "tokenizer.model"))
        eval_dir = pathlib.Path(eval_dir)
        chats = [chat_tokens(self.tokenizer, chat["messages"])
                 for chat in read_lines(eval_dir / "chats.jsonl")[:num_chats]]
        # The last token predicts nothing that is known.
        self.sequences = [ids[:-1] for ids, _ in chats]
        self.next_ids = np.concatenate([np.array(ids[1:]) for ids, _ in chats])
        self.is_answer = np.concatenate([is_answer[1:] for _, is_answer in chats])
        recitations = read_lines(eval_dir / "recite.jsonl")[:num_recitations]
        self.prompts = [self.tokenizer.encode(f"{BEGIN}User: {item['prompt']}\nAssistant: ")
                        for item in recitations]
        self.expected_texts = [item["answer"].strip() for item in recitations]

    def write(self, path):
        write_input(path, self.sequences, self.prompts)

    def is_recited(self, run):
        """Of each recitation, whether the greedy answer holds the expected text."""
        texts = [self.tokenizer.decode([i for i in ids if i != STOP_ID]) for ids in run.greedy]
        return [expected in text for expected, text in zip(self.expected_texts, texts)]


def write_input(path, sequences, prompts=()):
    with open(path, "w", encoding="utf-8") as file:
        for ids in sequences:
            file.write(json.dumps({"ids": ids}) + "\n")
        for ids in prompts:
            file.write(json.dumps({"ids": ids, "generate": GREEDY_TOKENS}) + "\n")


class Run:
    """What model_outputs wrote."""

    def __init__(self, directory):
        directory = pathlib.Path(directory)
        self.report = json.loads((directory / "outputs.json").read_text())
        self.greedy = self.report["greedy"]
        vocab_size = self.report["vocab_size"]
        size = (directory / "logits.f32").stat().st_size
        self.logits = np.memmap(directory / "logits.f32", np.float32, "r",
                                shape=(size // BYTES_OF_FLOAT // vocab_size, vocab_size)
                                ) if size else np.zeros((0, vocab_size), np.float32)


def run_program(program, model, input_path, directory, *flags):
    """A run of model_outputs into `directory`."""
    subprocess.run([program, "--model", model, "--input", input_path, "--output", directory, *flags],
                   check=True)
    return Run(directory)


def is_exact(run):
    """Whether every sequence gave the same bits as one prompt and token by token."""
    forced = run.report["teacher_forced"]
    return forced["same_bits_as_whole_prompts"] == forced["sequences"]


def seconds_of(run):
    forced = run.report["teacher_forced"]["seconds"]
    return f"{forced:.1f} s for the chats, {run.report['greedy_seconds']:.1f} s for the recitations"


def _losses(logits, ids):
    """Nats by which each row of logits misses its id."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1)
    log_sum = np.log(np.exp(logits - top[:, None]).sum(axis=-1)) + top
    return log_sum - logits[np.arange(len(ids)), ids]


def compare(reference, candidate, next_ids, is_answer):
    """Measures of two runs over the same positions, a dict. Differences are of logits."""
    assert reference.logits.shape == candidate.logits.shape
    assert len(reference.logits) == len(next_ids) == len(is_answer)
    same, largest, squares = [], [], 0.0
    losses = ([], [])
    chunk = max(1, COMPARED_LOGITS // reference.logits.shape[1])
    for begin in range(0, len(next_ids), chunk):
        rows = slice(begin, begin + chunk)
        a, b = np.array(reference.logits[rows]), np.array(candidate.logits[rows])
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise SystemExit("a logit is not finite")
        same.append(a.argmax(-1) == b.argmax(-1))
        difference = b.astype(np.float64) - a
        largest.append(np.abs(difference).max(-1))
        squares += (difference**2).sum()
        for of_run, logits in zip(losses, (a, b)):
            of_run.append(_losses(logits, next_ids[rows]))
    same, largest = np.concatenate(same), np.concatenate(largest)
    loss = [np.concatenate(of_run)[is_answer].mean() for of_run in losses]
    return {
        "positions": len(next_ids),
        "answer_tokens": int(is_answer.sum()),
        "same_top1": float(same.mean()),
        "same_top1_answers": float(same[is_answer].mean()),
        "reference_loss": float(loss[0]),
        "loss": float(loss[1]),
        "loss_ratio": float(loss[1] / loss[0]),
        "rms_difference": float(np.sqrt(squares / reference.logits.size)),
        "largest_difference": {
            "median_position": float(np.median(largest)),
            "99th_percentile": float(np.percentile(largest, 99)),
            "worst_position": float(largest.max())},
    }


def first_differences(prompts, reference, candidate):
    """[(index, the ids up to where the two continuations part, the next id of each)]. A text
    that has no next id there has ended at the limit, which the other has not reached: impossible
    while both have the same limit and the stop id is kept."""
    found = []
    for index, (prompt, a, b) in enumerate(zip(prompts, reference, candidate)):
        if a == b:
            continue
        at = next(i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1])
        found.append((index, prompt + a[:at], a[at], b[at]))
    return found


def command_line():
    """Of this script, without where its report goes."""
    words = [os.path.relpath(sys.argv[0])] + sys.argv[1:]
    if "--json" in words:
        at = words.index("--json")
        del words[at:at + 2]
    return " ".join(words)


class StageClock:
    """Prints what was done, with the seconds since it was made in front."""

    def __init__(self):
        self.began = time.monotonic()

    def note(self, text):
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", flush=True)


def describe_machine():
    """Names of the GPU, its driver and the CPU, and today's date."""
    def gpu():
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            first = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
        return ", driver ".join(first.splitlines()[0].split(", "))

    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(": ", 1)[1].strip() for line in file if line.startswith("model name")]
    return {"gpu": gpu(), "cpu": f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores",
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%F")}
