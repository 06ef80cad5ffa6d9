"""POLAR's pre-training triples: who writes what, what is kept of it, and going on after an interruption."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from trl_rewards_polar.triples import (
    Generation,
    Policy,
    Writer,
    build_triples,
    cut_loop,
    generate,
    main,
    plan_triples,
    prefix,
    read_policy,
    read_pool,
    trim_ending,
)

from trl_rewards import RewardError

SHORT = Generation(max_new_tokens=6, batch_size=4, dtype="float32", device="cpu")
DOCUMENTS = [f"the {noun} sat {count} times and ran" for noun in ("cat", "dog", "sky") for count in range(4)]
CHATS = [[{"role": "user", "content": document}] for document in DOCUMENTS]


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    """A random one-layer policy with a byte-level tokenizer of its own and 256 tokens of context."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    bytes_and_pairs = Tokenizer(models.BPE())
    bytes_and_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_and_pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    bytes_and_pairs.train_from_iterator(DOCUMENTS, trainer)
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_and_pairs, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=template
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pool(policy_path):
    """Three policies: one model at two temperatures, and the same architecture with other weights and tokens."""
    return [
        Policy(model=policy_path, name="plain"),
        Policy(model=policy_path, name="cold", temperature=0.3),
        Policy(model="bundled:tiny", name="tiny"),
    ]


def as_files(pool, folder):
    file = folder / "pool.yaml"
    file.write_text(json.dumps([{"model": policy.model, "name": policy.name} for policy in pool]))
    prompts = folder / "documents.jsonl"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return ["--pool", str(file), "--prompts", str(prompts), "--device", "cpu", "--dtype", "float32"]


# --- policies


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("org/model", {"model": "org/model", "name": "org/model"}),
        ("./run@./run/lora", {"model": "./run", "adapter": "./run/lora", "name": "./run@./run/lora"}),
        ("m?top_p=0.7&top_k=0", {"model": "m", "top_p": 0.7, "top_k": 0, "name": "m?top_p=0.7&top_k=0"}),
        ("m@a?name=early&revision=step100", {"model": "m", "adapter": "a", "name": "early", "revision": "step100"}),
    ],
)  # fmt: skip
def test_a_policy_is_read_from_its_text(text, wanted):
    assert read_policy(text) == Policy(**wanted)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("m?heat=2", "no setting heat; it takes model, name"),
        ("m?temperature=-1", "at least 0"),
        ("m?top_p=0", "top_p"),
    ],
)
def test_a_wrong_setting_of_a_policy_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        read_policy(text)


def test_sampling_defaults_are_the_paper_s():
    policy = Policy(model="m")
    assert (policy.temperature, policy.top_p, policy.top_k) == (1.0, 0.9, 50)


def test_a_pool_holds_texts_and_mappings(tmp_path):
    file = tmp_path / "pool.yaml"
    file.write_text("- m?temperature=0.7\n- {model: m, temperature: 1.3, name: hot}\n- {model: n}\n")
    assert [policy.name for policy in read_pool(file)] == ["m?temperature=0.7", "hot", "n"]
    (tmp_path / "m").mkdir()
    assert [policy.model for policy in read_pool(file)] == [str(tmp_path / "m"), str(tmp_path / "m"), "n"]
    file.write_text("m: 1")
    with pytest.raises(ValueError, match="must be a YAML list of policies, got dict"):
        read_pool(file)


# --- the plan


def test_the_plan_follows_from_its_arguments_alone():
    state = random.getstate()
    plan = plan_triples(50, "abcd", {"train": 40, "validation": 5}, seed=3)
    assert plan == plan_triples(50, "abcd", {"train": 40, "validation": 5}, seed=3)
    assert plan != plan_triples(50, "abcd", {"train": 40, "validation": 5}, seed=4)
    assert random.getstate() == state


def test_splits_share_no_prompt_and_test_has_the_held_out_policies_alone():
    plan = plan_triples(100, "abcdef", {"train": 200, "validation": 30, "test": 30}, held_out="ef")
    rows = {split: [triple for triple in plan if triple.split == split] for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 200, "validation": 30, "test": 30}
    prompts = {split: {triple.prompt for triple in found} for split, found in rows.items()}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))
    writers = {split: {row for t in found for row in (t.first, t.second)} for split, found in rows.items()}
    assert writers == {"train": {0, 1, 2, 3}, "validation": {0, 1, 2, 3}, "test": {4, 5}}


def test_a_triple_has_two_different_policies_and_all_ordered_pairs_occur_alike():
    plan = plan_triples(10, "abc", {"train": 6000})
    counts = Counter((triple.first, triple.second) for triple in plan)
    assert len(counts) == 6
    # A pair's count is binomial with mean 1000 and deviation 29.
    assert all(850 < count < 1150 for count in counts.values())


def test_every_prompt_is_used_before_one_is_used_again():
    plan = plan_triples(7, "ab", {"train": 20})
    assert sorted(Counter(triple.prompt for triple in plan).values()) == [2, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((5, ["a"], {"train": 5}), "needs two policies, got a"),
        ((5, ["a", "b", "c"], {"train": 5, "test": 2}, ["c"]), "split 'test' needs two policies, got c"),
        ((5, ["a", "b"], {"train": 5}, ["d"]), "held-out policies d are not in the pool: a, b"),
        ((5, ["a", "a"], {"train": 5}), "two policies have one name"),
        ((1, ["a", "b"], {"train": 5, "validation": 5}), "1 prompts are not enough"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, says):
    with pytest.raises(ValueError, match=says):
        plan_triples(*arguments)


# --- prefixes, loops and endings


@pytest.fixture(scope="module")
def tokenizer(policy_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(policy_path)


def test_a_prefix_is_the_document_s_beginning_of_every_length_in_the_range(tokenizer):
    document = "the cat sat 3 times the dog ran 4 times"
    ids = tokenizer(document)["input_ids"]
    lengths = Counter()
    for step in range(100):
        text = prefix(document, tokenizer, 2, 5, step / 100)
        assert document.startswith(text)
        lengths[len(tokenizer(text)["input_ids"])] += 1
    assert lengths == {2: 25, 3: 25, 4: 25, 5: 25}
    assert len(ids) > 5
    assert prefix(document, tokenizer, 1000, 2000, 0.5) == document


def test_a_prefix_does_not_end_within_a_character_and_is_never_empty(tokenizer):
    document = "猫は三回"  # the test's tokenizer has a token per byte of these
    assert {prefix(document, tokenizer, 1, 9, step / 9) for step in range(9)} == {"猫", "猫は", "猫は三"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("I go home. " * 4, "I go home. "),
        ("He says: " + "I go home. " * 4 + "I go", "He says: I go home."),  # ends within a round
        ("x" * 40, "x"),
        ("a 1000 and ha ha ha", "a 1000 and ha ha ha"),  # too short for a loop
        ("I go home. I go home and I stay there.", "I go home. I go home and I stay there."),
        ("I go home. " * 4 + "Then I rest.", "I go home. " * 4 + "Then I rest."),  # got out of it
        ("", ""),
    ],
)
def test_a_loop_keeps_one_round(text, wanted):
    assert cut_loop(text) == wanted


def test_what_is_cut_is_no_loop_any_more():
    rng = random.Random(0)
    for _ in range(200):
        unit = "".join(rng.choice("ab ") for _ in range(rng.randint(1, 9)))
        once = cut_loop("start " + unit * rng.randint(1, 30))
        assert cut_loop(once) == once


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It is 3.5 metres. Then we", "It is 3.5 metres."),
        ('He said "No." And th', 'He said "No."'),
        ("It costs 3.5", "It costs 3.5"),  # no sentence ends
        ("Done.", "Done."),
        ("猫です。犬", "猫です。"),
    ],
)
def test_a_broken_last_sentence_goes(text, wanted):
    assert trim_ending(text) == wanted


# --- writing


def test_the_same_request_gives_the_same_text_and_leaves_torch_s_stream_alone(pool):
    import torch

    state = torch.get_rng_state()
    first, second = (generate(pool[0], DOCUMENTS, SHORT) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(pool[0], DOCUMENTS, Generation(**(vars(SHORT) | {"seed": 1}))) != first


def test_sampling_follows_the_policy_and_not_the_model_s_own_defaults(pool, policy_path, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(policy_path)
    model.generation_config.update(repetition_penalty=9.0, do_sample=True, min_new_tokens=5)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(policy_path).save_pretrained(tmp_path)
    greedy = {"temperature": 0.0, "name": "greedy"}
    wanted = generate(Policy(model=policy_path, **greedy), DOCUMENTS, SHORT)
    assert generate(Policy(model=str(tmp_path), **greedy), DOCUMENTS, SHORT) == wanted


def test_batching_leaves_greedy_texts_as_they_are(policy_path):
    greedy = Policy(model=policy_path, name="greedy", temperature=0.0)
    one = Generation(**(vars(SHORT) | {"batch_size": 1}))
    assert generate(greedy, DOCUMENTS, SHORT) == generate(greedy, DOCUMENTS, one)


def test_a_chat_goes_through_the_policy_s_own_template(pool):
    writer = Writer(pool[0], SHORT)
    (batch,) = writer.batches({0: CHATS[0]})
    assert (
        writer.sampler.tokenizer.decode(batch[0])
        == f"<|im_start|>user\n{DOCUMENTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    )
    (batch,) = writer.batches({0: DOCUMENTS[0]})
    assert writer.sampler.tokenizer.decode(batch[0]) == DOCUMENTS[0]


def test_a_prompt_that_does_not_fit_is_said_and_a_long_one_leaves_what_room_there_is(pool, monkeypatch):
    writer = Writer(pool[0], SHORT)  # 256 tokens of context
    with pytest.raises(RewardError, match="policy 'plain' has a context of 256 tokens, and a prompt has 300"):
        writer.batches({0: "!" * 300})
    lengths, model_generate = [], writer.sampler.model.generate

    def spy(**options):
        lengths.append(options["max_new_tokens"])
        return model_generate(**options)

    monkeypatch.setattr(writer.sampler.model, "generate", spy)
    for batch in writer.batches({0: "!?" * 127, 1: "!?", 2: "!", 3: "?", 4: "?!"}):
        writer.write(batch)
    assert lengths == [6, 2]


def test_an_adapter_changes_what_is_written(policy_path, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(policy_path), LoraConfig(r=2, target_modules="all-linear")
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "lora")
    plain, adapted = (
        generate(read_policy(f"{path}?temperature=0"), DOCUMENTS, SHORT)
        for path in (policy_path, f"{policy_path}@{tmp_path / 'lora'}")
    )
    assert plain != adapted


# --- triples


def test_reference_and_chosen_are_the_first_policy_s_and_rejected_the_second_s(policy_path):
    """Greedy policies show who wrote what: each has one text for a prompt."""
    greedy = [
        Policy(model=policy_path, name="a", temperature=0.0),
        Policy(model="bundled:tiny", name="b", temperature=0.0),
    ]
    writes = {policy.name: dict(zip(DOCUMENTS, generate(policy, DOCUMENTS, SHORT), strict=True)) for policy in greedy}
    rows = build_triples(greedy, DOCUMENTS, {"train": 12}, generation=SHORT)["train"]
    assert len(rows) > 6
    for row in rows:
        first, second = row["policies"]
        assert {first, second} == {"a", "b"}
        assert row["reference"] == row["chosen"] == writes[first][row["prompt"]]
        assert row["rejected"] == writes[second][row["prompt"]]
        assert row["wrapper"] == "pretrain"


def test_chats_give_text_prompts_in_the_wrapper_for_them(pool):
    chats = [[{"role": "system", "content": "Be brief."}, *chat] for chat in CHATS]
    rows = build_triples(pool, chats, {"train": 6}, generation=SHORT)["train"]
    assert rows
    assert all(row["prompt"].removeprefix("Be brief.\n") in DOCUMENTS and row["wrapper"] == "sft" for row in rows)


def test_triples_without_a_difference_are_left_out(policy_path):
    same = [Policy(model=policy_path, name=name, temperature=0.0) for name in "ab"]
    assert build_triples(same, DOCUMENTS, {"train": 5}, generation=SHORT) == {"train": []}


def test_triples_without_a_reference_are_left_out(pool, monkeypatch):
    write = Writer.write
    monkeypatch.setattr(
        Writer, "write", lambda self, batch: [(row, "" if row == 0 else text) for row, text in write(self, batch)]
    )
    rows = build_triples(pool, DOCUMENTS, {"train": 5}, generation=SHORT)["train"]
    assert len(rows) == 4


def test_an_interrupted_run_goes_on_and_gives_what_an_uninterrupted_one_gives(pool, tmp_path, monkeypatch):
    wanted = build_triples(pool, DOCUMENTS, {"train": 12}, generation=SHORT)
    work, calls, write = tmp_path / "work", [], Writer.write

    def stops(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(self, batch)

    monkeypatch.setattr(Writer, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        build_triples(pool, DOCUMENTS, {"train": 12}, generation=SHORT, work=work)
    work.write_bytes(work.read_bytes() + b'[[0, "torn')  # the process died within a line
    assert build_triples(pool, DOCUMENTS, {"train": 12}, generation=SHORT, work=work) == wanted
    in_all = len(calls)
    assert build_triples(pool, DOCUMENTS, {"train": 12}, generation=SHORT, work=work) == wanted
    assert len(calls) == in_all  # nothing is written twice
    with pytest.raises(RewardError, match="holds trajectories of another plan"):
        build_triples(pool, DOCUMENTS, {"train": 11}, generation=SHORT, work=work)


# --- the command


def test_the_command_writes_a_folder_that_is_a_dataset_with_its_splits(pool, tmp_path, capsys):
    from trl_rewards.data import load_splits

    extra = Policy(model=pool[0].model, name="warm", temperature=1.2)
    out = tmp_path / "triples"
    words = [*as_files([*pool, extra], tmp_path), "--out", str(out), "--max-new-tokens", "6"]
    words += ["--pairs", "8", "--validation", "3", "--test", "3", "--held-out", "tiny", "warm"]
    main(words)
    assert "8 train, 3 validation, 3 test triples of 4 policies" in capsys.readouterr().out
    splits = load_splits(str(out))
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "validation": 3, "test": 3}
    assert splits["train"].column_names == ["prompt", "reference", "chosen", "rejected", "wrapper", "policies"]
    assert {name for row in splits["test"]["policies"] for name in row} == {"tiny", "warm"}
    assert all(any(text.startswith(prompt) for text in DOCUMENTS) for prompt in splits["train"]["prompt"])
    assert sorted(path.name for path in out.iterdir()) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    assert not list(tmp_path.glob("*.unfinished"))


def test_the_command_writes_one_file_and_does_not_write_over_it(pool, tmp_path, capsys):
    out = tmp_path / "triples.jsonl"
    words = [*as_files(pool, tmp_path), "--out", str(out), "--max-new-tokens", "6", "--prefix-tokens", "1", "4"]
    main(words)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(DOCUMENTS)
    with pytest.raises(SystemExit):
        main(words)
    assert f"{out} exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "words", "says"),
    [
        ({"question": "?"}, [], "no column 'prompt' or 'text' but question"),
        ({"text": "the cat"}, ["--split", "test"], "no split 'test'"),
        ({"text": "the cat"}, ["--validation", "1"], "leave none to train on"),
    ],
)
def test_the_command_says_what_is_wrong_with_the_prompts(row, words, says, pool, tmp_path, capsys):
    given = as_files(pool, tmp_path)
    (tmp_path / "documents.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit):
        main([*given, *words, "--out", str(tmp_path / "out.jsonl")])
    assert says in capsys.readouterr().err
