"""Rewards that compare an answer with reference answers: BLEU, ROUGE-L, BERTScore, and what goes with them."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "bertscore": "trl_rewards_bleuberi.bertscore:BertScore",
        "bleu_rouge_f1": "trl_rewards_bleuberi.rouge:BleuRougeF1",
        "bleuberi": "trl_rewards_bleuberi.bleuberi:Bleuberi",
        "rouge_l": "trl_rewards_bleuberi.rouge:RougeL",
        "think_answer_format": "trl_rewards_bleuberi.think_answer_format:ThinkAnswerFormat",
    }


@hookimpl
def register_combiners():
    return {"bleu_rm": "trl_rewards_bleuberi.bleu_rm:BleuRm"}


@hookimpl
def register_selectors():
    return {
        "easy": "trl_rewards_bleuberi.selection:Easy",
        "hard": "trl_rewards_bleuberi.selection:Hard",
        "medium": "trl_rewards_bleuberi.selection:Medium",
        "random": "trl_rewards_bleuberi.selection:Random",
    }
