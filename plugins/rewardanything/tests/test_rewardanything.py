import hashlib
import json
import random
import shutil
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from trl_rewards_rewardanything import prompts, register_rewards
from trl_rewards_rewardanything.principles import PRINCIPLES
from trl_rewards_rewardanything.prompts import OWN, legacy_order, released_system_prompt, user_message
from trl_rewards_rewardanything.rewardanything import RewardAnything

from trl_rewards import Context, Failed, RewardError, Samples, load_reward
from trl_rewards.models.scripted_judge import ScriptedJudge
from trl_rewards.testing import check_reward, run_reward

FILE = Path(__file__).with_name("rewardanything_cases.json")
CASES = {case["id"]: case for case in json.loads(FILE.read_text(encoding="utf-8"))["cases"]}
PERMUTATIONS = {  # by group size: the original place of what is shown in each slot
    2: [1, 0], 3: [1, 0, 2], 4: [2, 1, 3, 0], 5: [3, 1, 2, 4, 0], 6: [3, 1, 2, 4, 0, 5], 7: [1, 3, 4, 2, 6, 0, 5],
    8: [3, 4, 6, 7, 2, 5, 0, 1],
}  # fmt: skip


def masked(responses):
    """Responses as the released code shows them, and what each name stands for."""
    names = list(responses)
    shown = [names[place] for place in legacy_order(len(names))]
    texts = {f"model-{slot}": responses[name] for slot, name in enumerate(shown, start=1)}
    return texts, {f"model-{slot}": name for slot, name in enumerate(shown, start=1)}


def test_the_released_system_prompt_is_known_by_its_hash():
    recorded = CASES["ra-sys-01-system-prompt-fingerprint"]["output"]
    assert recorded["sha256"] == prompts.RELEASED_SHA256
    assert hashlib.sha256(OWN.encode()).hexdigest() != prompts.RELEASED_SHA256


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the installed `rewardanything`, whose import would raise."""

    def install(source):
        (tmp_path / "rewardanything").mkdir(exist_ok=True)
        (tmp_path / "rewardanything" / "__init__.py").write_text("raise ImportError('it takes torch along')")
        (tmp_path / "rewardanything" / "processing.py").write_text(source)

    monkeypatch.syspath_prepend(str(tmp_path))
    return install


def test_the_released_system_prompt_is_read_from_the_installed_package(package, monkeypatch):
    package('import scipy\nSYSTEM_PROMPT = """\nJudge.\n"""\n')
    monkeypatch.setattr(prompts, "RELEASED_SHA256", hashlib.sha256(b"\nJudge.\n").hexdigest())
    assert released_system_prompt() == "\nJudge.\n"


def test_another_system_prompt_than_the_released_one_is_refused(package):
    package('SYSTEM_PROMPT = "Judge."')
    with pytest.raises(RewardError, match="is not the one that RewardAnything-8B-v1 was trained with"):
        released_system_prompt()


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "rewardanything").mkdir()  # such as a folder of recipes in the working directory
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RewardError, match="pip install rewardanything"):
        released_system_prompt()


@pytest.mark.parametrize("case", [c for c in CASES.values() if "ra-msg" in c["id"]], ids=lambda case: case["id"])
def test_messages_are_the_recorded_ones(case):
    given = case["input"]
    responses, names = masked(given["responses"]) if given["mask_responses"] else (given["responses"], None)
    assert user_message(given["principle"], given["prompt"], responses) == case["output"]["user_content"]
    assert names == case["output"]["masked2real"]


def test_unicode_stays_and_control_characters_are_escaped():
    message = user_message("p", "山 🙂", {"model-1": 'a\n\t"\\', "model-2": ""})
    assert message == (
        '{"principle": "p", "prompt": "山 🙂", "responses": {"model-1": "a\\n\\t\\"\\\\", "model-2": ""}}'
    )


def test_legacy_masks_are_the_recorded_ones():
    recorded = CASES["ra-mask-02-three"]
    assert masked(recorded["input"]) == (recorded["output"]["masked"], recorded["output"]["masked2real"])
    assert masked({}) == ({}, {})
    for count, permutation in PERMUTATIONS.items():
        assert legacy_order(count) == permutation


def test_the_global_random_stream_is_left_alone():
    reward = RewardAnything(model="m", endpoint="bundled:judge", principle="concise", masks="legacy_seed42")
    random.seed(7)
    wanted = random.random()
    random.seed(7)
    try:
        run_reward(reward, group("a b", "a", "a b c"))
    finally:
        reward.close()
    assert random.random() == wanted  # the released code starts the stream anew at seed 42


def test_recorded_replies_are_unmasked():
    recorded = CASES["ra-e2e-01-roundtrip"]
    responses, names = masked(recorded["input"]["responses"])
    assert user_message("P", "Q", responses) == recorded["output"]["user_content"]
    assert names == recorded["output"]["masked2real"]


def group(*completions, **columns):
    """One group."""
    columns = {name: [value] * len(completions) for name, value in columns.items()}
    return Samples(["Q?"] * len(completions), list(completions), columns=columns, group_size=len(completions))


@contextmanager
def server(answer):
    """A real HTTP server; `answer(path, body)` gives status and body. It keeps what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            status, reply = answer(self.path, body)
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", asked
    finally:
        httpd.shutdown()
        httpd.server_close()


def says(write):
    """An OpenAI-compatible endpoint that replies `write(responses)`, which are the candidates by name."""

    def answer(path, body):
        assert path == "/v1/chat/completions"
        text = write(json.loads(body["messages"][-1]["content"])["responses"])
        return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}

    return answer


def judged(write, samples, **options):
    """Scores by such an endpoint, and the requests it got."""
    with server(says(write)) as (url, asked):
        options = {"principle": "Prefer the shortest response.", "parse_retries": 0} | options
        reward = RewardAnything(model="m", endpoint=f"{url}/v1", **options)
        try:
            return run_reward(reward, samples), [body for _, body in asked]
        finally:
            reward.close()


def by_text(**scores):
    """A judge with a score for each text, who ranks in the order of `scores`."""

    def write(responses):
        ranking = [name for text in scores for name in responses if responses[name] == text]
        verdict = {"scores": {name: scores[text] for name, text in responses.items()}, "best-to-worst": ranking}
        return f"<think>hm</think>{json.dumps(verdict)}"

    return write


def test_the_request_has_the_released_form_and_settings():
    scores, (request,) = judged(by_text(A=4, B=5, C=3), group("A", "B", "C"), masks="legacy_seed42")
    assert scores == [4.0, 5.0, 3.0]
    recorded = CASES["ra-srv-01-single"]["output"]["upstream"]
    assert {name: request[name] for name in recorded["sampling"]} == recorded["sampling"]
    assert [message["role"] for message in request["messages"]] == recorded["roles"]
    assert request["model"] == "m"
    wanted = json.loads(recorded["user_content"]) | {"principle": "Prefer the shortest response.", "prompt": "Q?"}
    assert request["messages"][1]["content"] == json.dumps(wanted)
    assert request["messages"][0]["content"] == OWN


def test_the_whole_group_is_one_question_and_scores_find_their_rows():
    samples = Samples(["Q1"] * 3 + ["Q2"] * 3, ["A", "B", "C", "C", "A", "B"], group_size=3)
    scores, requests = judged(by_text(A=5, B=3, C=1), samples)
    assert scores == [5.0, 3.0, 1.0, 1.0, 5.0, 3.0]
    assert sorted(json.loads(request["messages"][1]["content"])["prompt"] for request in requests) == ["Q1", "Q2"]


def test_seeded_masks_differ_between_groups_and_are_the_same_again():
    texts = ["A", "B", "C", "D"]
    samples = Samples([f"Q{n // 4}" for n in range(24)], texts * 6, group_size=4)
    orders = []
    for _ in range(2):
        _, requests = judged(by_text(A=5, B=4, C=3, D=2), samples)
        questions = [json.loads(request["messages"][1]["content"]) for request in requests]
        orders.append({question["prompt"]: tuple(question["responses"].values()) for question in questions})
    assert orders[0] == orders[1]
    assert len(set(orders[0].values())) > 1


def test_masks_off_shows_the_rows_as_they_are():
    _, (request,) = judged(by_text(A=5, B=4, C=3), group("B", "A", "C"), masks="off")
    shown = json.loads(request["messages"][1]["content"])["responses"]
    assert shown == {"model-1": "B", "model-2": "A", "model-3": "C"}


def test_chat_prompts_are_flattened_with_their_roles():
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Q"},
    ]
    samples = Samples([chat] * 2, ["A", "B"], group_size=2)
    _, (request,) = judged(by_text(A=5, B=4), samples)
    assert json.loads(request["messages"][1]["content"])["prompt"] == "user: Hi\n\nassistant: Yes?\n\nuser: Q"


def test_reward_options_worked_by_hand():
    judge = by_text(B=4, A=4, C=1)  # ranked in this order
    samples = group("A", "B", "C")
    assert judged(judge, samples)[0] == [4.0, 4.0, 1.0]
    assert judged(judge, samples, reward="unit")[0] == [0.75, 0.75, 0.0]
    assert judged(judge, samples, reward="rank")[0] == [0.5, 1.0, 0.0]
    assert judged(judge, samples, reward="score_ranked")[0] == pytest.approx([4.05, 4.1, 1.0])
    assert judged(judge, samples, reward="score_ranked", tie_break=0.5)[0] == pytest.approx([4.25, 4.5, 1.0])


def test_what_neither_scores_nor_ranking_tell_apart_shares_its_place():
    def write(responses):
        return json.dumps({"scores": {name: 3 if text == "A" else 2 for name, text in responses.items()}})

    assert judged(write, group("A", "A", "B", "B"), reward="rank")[0] == pytest.approx([5 / 6, 5 / 6, 1 / 6, 1 / 6])


@pytest.mark.parametrize(("reward", "wanted"), [("score", 4.0), ("unit", 0.75), ("rank", 0.5), ("score_ranked", 4.05)])
def test_a_group_of_one_is_defined(reward, wanted):
    assert judged(by_text(A=4), group("A"), reward=reward)[0] == [pytest.approx(wanted)]


def test_an_empty_completion_gets_the_lowest_score_unasked_or_is_shown():
    scores, (request,) = judged(by_text(A=4, B=2), group("A", " ", "B"))
    assert scores == [4.0, 1.0, 2.0]
    assert list(json.loads(request["messages"][1]["content"])["responses"]) == ["model-1", "model-2"]
    assert judged(by_text(A=4, B=2), group("A", "", "B"), reward="unit")[0] == [0.75, 0.0, 0.25]
    assert judged(by_text(A=4, B=2), group("A", "", "B"), reward="rank")[0] == [1.0, 0.0, 0.5]

    def write(responses):
        assert "" in responses.values()
        return json.dumps({"scores": dict.fromkeys(responses, 3)})

    assert judged(write, group("A", ""), min_length=0)[0] == [3.0, 3.0]


def test_no_groups_give_no_scores():
    assert judged(by_text(), Samples([], [], group_size=4)) == ([], [])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("The first one.", "no JSON object"),
        ("", "no JSON object"),
        ('{"best-to-worst": ["model-1"]}', "no scores"),
        ('{"scores": {"model-1": 9, "model-2": 0}}', "no score that is a number from 1 to 5"),
        ('{"scores": {"somebody": 3}}', "2 of 2 candidates missing"),
        ('{"scores": {"model-1": 3, "model-2": NaN}}', "1 of 2 candidates missing"),
    ],
)
def test_a_reply_that_cannot_be_used_is_a_hole_of_its_group_with_its_reason(reply, reason):
    scores, requests = judged(lambda responses: reply, group("A", "B"), parse_retries=1)
    assert all(isinstance(score, Failed) and reason in score.reason for score in scores)
    assert [request["temperature"] for request in requests] == [0.0, 0.7]  # asked again, warmer


def test_partial_replies_may_be_kept():
    def write(responses):
        return json.dumps({"scores": {name: 4 for name, text in responses.items() if text != "B"}})

    kept = judged(write, group("A", "B", "C"), partial="keep")[0]
    assert (kept[0], kept[2]) == (4.0, 4.0)
    assert kept[1] == Failed("1 of 3 candidates missing")


def test_clamp_believes_scores_beyond_the_scale():
    assert judged(by_text(A=9, B=0), group("A", "B"), clamp=True)[0] == [5.0, 1.0]


def test_one_unreadable_group_of_many_costs_only_its_rows():
    def write(responses):
        return "no idea" if "B" in responses.values() else by_text(A=4, C=2)(responses)

    samples = Samples(["Q1", "Q1", "Q2", "Q2", "Q3", "Q3"], ["A", "C", "A", "B", "C", "A"], group_size=2)
    with server(says(write)) as (url, _):
        logged = {}
        reward = RewardAnything(model="m", endpoint=f"{url}/v1", principle="concise", parse_retries=0)
        reward.setup(Context(log_metric=logged.__setitem__))
        scores = run_reward(reward, samples)
        reward.close()
    assert scores[:2] + scores[4:] == [4.0, 2.0, 2.0, 4.0]
    assert all(isinstance(score, Failed) for score in scores[2:4])
    assert logged["rewardanything/unparsable"] == 1.0


def test_large_groups_are_asked_about_in_windows_and_put_on_one_scale():
    texts = [f"{'word ' * n}end" for n in range(12)]
    with ScriptedJudge() as judge:
        reward = RewardAnything(model="m", endpoint=judge.url, principle="concise", reward="rank", window=5)
        scores = run_reward(reward, group(*texts))
        reward.close()
        assert {len(json.loads(request["messages"][1]["content"])["responses"]) for request in judge.requests} <= {
            3,
            4,
            5,
        }
    assert all(isinstance(score, float) and 0 <= score <= 1 for score in scores)
    assert sum(scores[:4]) > sum(scores[8:])


def test_several_permutations_are_averaged():
    def first_is_best(responses):
        return json.dumps({"scores": {name: 5 if name == "model-1" else 1 for name in responses}})

    scores, requests = judged(first_is_best, group("A", "B"), permutations=12)
    assert len(requests) == 12
    shown_first = [json.loads(request["messages"][1]["content"])["responses"]["model-1"] for request in requests]
    assert scores[0] == pytest.approx(1 + 4 * shown_first.count("A") / 12)
    assert 1 < scores[0] < 5


def principle_sent(samples, tmp_path=".", **options):
    """The principle in each request."""
    with server(says(by_text(A=4, B=2))) as (url, asked):
        reward = RewardAnything(model="m", endpoint=f"{url}/v1", **options)
        reward.setup(Context(base_dir=str(tmp_path)))
        scores = run_reward(reward, samples)
        reward.close()
        return [json.loads(body["messages"][1]["content"])["principle"] for _, body in asked], scores


def test_principles_are_words_names_files_or_several_by_priority(tmp_path):
    (tmp_path / "mine.txt").write_text("Rhyme.\n")
    rows = group("A", "B")
    assert principle_sent(rows, principle="Prefer rhymes.")[0] == ["Prefer rhymes."]
    assert principle_sent(rows, principle="warm")[0] == [PRINCIPLES["warm"].text]
    assert principle_sent(rows, tmp_path, principle="./mine.txt")[0] == ["Rhyme."]
    (several,) = principle_sent(rows, tmp_path, principle=["safe", "file:mine.txt"])[0]
    assert several.splitlines()[1:] == [f"1. {PRINCIPLES['safe'].text}", "2. Rhyme."]


def test_a_column_gives_each_group_its_principle():
    samples = Samples(
        ["Q"] * 6, ["A", "B"] * 3, columns={"by": ["warm"] * 2 + [["warm", "Rhyme."]] * 2 + [None] * 2}, group_size=2
    )
    sent, scores = principle_sent(samples, principle_column="by", principle="Be brief please.")
    assert sorted(text.splitlines()[-1] for text in sent) == sorted(
        ["2. Rhyme.", "Be brief please.", PRINCIPLES["warm"].text]
    )
    assert scores == [4.0, 2.0] * 3


def test_a_row_without_a_principle_has_no_opinion():
    samples = Samples(["Q"] * 4, ["A", "B", "A", ""], columns={"by": ["Rhyme."] * 2 + [""] * 2}, group_size=2)
    sent, scores = principle_sent(samples, principle_column="by")
    assert sent == ["Rhyme."]
    assert scores == [4.0, 2.0, None, None]


def test_a_dataset_cannot_have_a_file_read(tmp_path):
    (tmp_path / "secret.txt").write_text("hidden")
    samples = group("A", "B", by=f"file:{tmp_path}/secret.txt")
    assert principle_sent(samples, principle_column="by")[0] == [f"file:{tmp_path}/secret.txt"]


def test_a_principle_file_that_is_not_there_is_named_before_training(tmp_path):
    reward = RewardAnything(model="m", endpoint="bundled:judge", principle="./gone.txt")
    with pytest.raises(RewardError, match=r"principle: .*gone\.txt"):
        reward.setup(Context(base_dir=str(tmp_path)))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(RewardError, match="is empty"):
        RewardAnything(model="m", principle="./empty.txt").setup(Context(base_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a principle is needed"),
        ({"principle": []}, "a principle is needed"),
        ({"principle": "concis"}, "did you mean 'concise'"),
        ({"principle": "concise", "scale": [1.0, 10.0]}, "scores from 1 to 5"),
        ({"principle": "concise", "tie_break": -1.0}, "tie_break must not be negative"),
        ({"principle": "concise", "masks": "off", "permutations": 2}, "one order only"),
        ({"principle": "concise", "backend": "server"}, "needs endpoint"),
        ({"principle": "concise", "backend": "server", "endpoint": "http://x", "cassette": "c"}, "has no cassette"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RewardAnything(model="m", **options)


def test_show_lists_the_library():
    from trl_rewards.commands.show import describe

    text = describe("rewardanything")
    assert all(f"\n  {name} " in text for name in PRINCIPLES)
    assert "Paper: https://huggingface.co/papers/2506.03637" in text


@pytest.mark.slow  # the kit imports torch
def test_the_judge_keeps_the_contract():
    reward = load_reward(
        register_rewards()["rewardanything"], model="m", endpoint="bundled:judge", principle="concise"
    )
    try:
        check_reward(reward)
    finally:
        reward.close()


@pytest.mark.slow
def test_a_group_that_leaves_no_room_for_the_reply_is_a_hole(policy_path):
    reward = RewardAnything(model=policy_path, principle="concise", dtype="float32", device="cpu", max_tokens=64)
    reward.setup(Context())
    scores = run_reward(reward, group("A", "B"))
    reward.close()
    assert all(isinstance(score, Failed) and "leaves no room for max_tokens 64" in score.reason for score in scores)


@pytest.mark.slow
def test_a_model_in_this_process_that_writes_nonsense_leaves_holes(policy_path, tmp_path):
    shutil.copytree(policy_path, tmp_path / "judge")
    config = tmp_path / "judge" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    reward = RewardAnything(
        model="./judge", principle="concise", dtype="float32", device="cpu", max_tokens=8, parse_retries=0
    )
    reward.setup(Context(base_dir=str(tmp_path)))
    scores = run_reward(reward, group("A", "B"))
    reward.close()
    assert all(isinstance(score, Failed) and "no JSON object" in score.reason for score in scores)
    assert reward.metrics["unparsable"] == 1.0


class ReleasedServer:
    """What the released server answers, bugs included; the model behind it prefers shorter texts."""

    def __init__(self):
        self.fails = {}  # prompt -> how many requests meet a 500
        self.delays = {}  # prompt -> seconds

    def __call__(self, path, body):
        if path == "/api/rewardanything_batch":  # in the order in which they are done
            done = []
            threads = [threading.Thread(target=lambda one=one: done.append(self.judge(one))) for one in body]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return 200, done
        if path != "/api/rewardanything":
            return 404, {"detail": "Not Found"}
        if not isinstance(body["prompt"], str) or not all(
            isinstance(text, str) for text in body["responses"].values()
        ):
            return 422, {"detail": "Input should be a valid string"}
        if self.fails.get(body["prompt"], 0) > 0:
            self.fails[body["prompt"]] -= 1
            return 500, {"detail": "Error: Empty response from remote OpenAI API"}
        return 200, self.judge(body)

    def judge(self, body):
        time.sleep(self.delays.get(body["prompt"], 0))
        if body["prompt"] == "unparsable":
            return {"thoughts": "", "results": {"scores": {}, "best-to-worst": []}}
        responses = body["responses"]
        if body.get("mask_responses", True):
            order = [list(responses)[place] for place in legacy_order(len(responses))]
            responses = {name: responses[name] for name in order}
        ranking = sorted(responses, key=lambda name: len(responses[name]))
        scores = {name: 5 - place for place, name in enumerate(ranking)}
        return {"thoughts": f"judging {body['prompt']}", "results": {"scores": scores, "best-to-worst": ranking}}


def served(released, samples, **options):
    with server(released) as (url, asked):
        reward = RewardAnything(model="m", backend="server", endpoint=url, principle="Be brief, please.", **options)
        try:
            return run_reward(reward, samples), asked, reward.metrics
        finally:
            reward.close()


def test_the_single_route_is_asked_in_its_form():
    scores, asked, metrics = served(ReleasedServer(), group("AAA", "A", "AA"), masks="off")
    assert scores == [3.0, 5.0, 4.0]
    responses = {"model-1": "AAA", "model-2": "A", "model-3": "AA"}
    wanted = {"principle": "Be brief, please.", "prompt": "Q?", "responses": responses, "mask_responses": False}
    assert asked == [("/api/rewardanything", wanted)]
    assert (metrics["requests"], metrics["unparsable"]) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["ra-srv-01-single", "ra-srv-02-unmasked", "ra-cli-01-judge"])
def test_recorded_replies_of_the_released_server_are_read(name):
    recorded = CASES[name]
    body = recorded["output"].get("body")
    results = body["results"] if body else {"scores": recorded["output"]["scores"]}
    names = list(recorded["input"]["responses"])
    scores, asked, _ = served(
        lambda path, body: (200, {"thoughts": "", "results": renamed(results, names)}),
        group(*"ABC"[: len(names)]),
        masks="off",
    )
    assert scores == [float(results["scores"][name]) for name in names]
    assert asked[0][1].keys() == {*recorded["input"], "mask_responses"}


def renamed(results, names):
    """Recorded results with the names that we send in place of the recorded ones."""
    new = {name: f"model-{slot}" for slot, name in enumerate(names, start=1)}
    return {
        "scores": {new[name]: score for name, score in results["scores"].items()},
        "best-to-worst": [new[name] for name in results.get("best-to-worst", [])],
    }


def test_groups_keep_their_scores_whatever_order_they_are_done_in():
    released = ReleasedServer()
    released.delays = {"first": 0.3, "second": 0.15, "third": 0.0}
    prompts_of = ["first"] * 2 + ["second"] * 2 + ["third"] * 2
    samples = Samples(prompts_of, ["A", "AA", "BB", "B", "C", "CC"], group_size=2)
    scores, asked, _ = served(released, samples)
    assert scores == [5.0, 4.0, 4.0, 5.0, 5.0, 4.0]
    assert {path for path, _ in asked} == {"/api/rewardanything"}
    # The batch route, which is never used, answers in another order than it was asked in.
    bodies = [{"prompt": prompt, "responses": {"a": "A"}} for prompt in ("first", "second", "third")]
    assert [item["thoughts"] for item in released("/api/rewardanything_batch", bodies)[1]] == [
        "judging third",
        "judging second",
        "judging first",
    ]


def test_one_failing_group_of_many_costs_only_its_rows():
    released = ReleasedServer()
    released.fails = {"bad": 99}
    samples = Samples(["good"] * 2 + ["bad"] * 2 + ["unparsable"] * 2, ["A", "AA"] * 3, group_size=2)
    scores, _, metrics = served(released, samples, attempts=2)
    assert scores[:2] == [5.0, 4.0]
    assert all(isinstance(score, Failed) and "500" in score.reason for score in scores[2:4])
    assert all(isinstance(score, Failed) and "no scores" in score.reason for score in scores[4:])
    assert (metrics["unparsable"], metrics["http_failures"]) == (1.0, 1.0)


def test_a_500_is_asked_again():
    released = ReleasedServer()
    released.fails = {"Q?": 2}
    scores, asked, metrics = served(released, group("A", "AA"))
    assert scores == [5.0, 4.0]
    assert len(asked) == 3
    assert metrics["retries"] == 2.0


def test_chat_prompts_reach_the_server_as_text():
    samples = Samples([[{"role": "user", "content": "x"}]] * 2, ["A", "AA"], group_size=2)
    scores, asked, _ = served(ReleasedServer(), samples)
    assert scores == [5.0, 4.0]
    assert asked[0][1]["prompt"] == "x"


@pytest.mark.parametrize(
    "answer", [None, [], "text", {}, {"results": None}, {"results": [1]}, {"results": {"scores": 3}}]
)
def test_an_answer_of_another_form_is_a_hole(answer):
    scores, _, _ = served(lambda path, body: (200, answer), group("A", "AA"))
    assert all(isinstance(score, Failed) for score in scores)


def test_a_client_waits_longer_than_the_server_does():
    assert RewardAnything(model="m", principle="concise").request_timeout >= 150
