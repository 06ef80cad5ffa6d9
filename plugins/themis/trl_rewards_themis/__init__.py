"""Themis: a reward model that calls tools, says why, and then scores; and its tools."""

from trl_rewards import hookimpl


@hookimpl
def register_rewards():
    return {
        "themis": "trl_rewards_themis.themis:Themis",
        "themis_served": "trl_rewards_themis.served:ThemisServed",
    }


@hookimpl
def register_objectives():
    return {"themis": "trl_rewards_themis.objective:ThemisObjective"}


@hookimpl
def register_tools():
    return {
        "arithmetic": "trl_rewards_themis.tools.expression:Arithmetic",
        "calculator": "trl_rewards_themis.tools.calculator:Calculator",
        "calendar": "trl_rewards_themis.tools.calendar:Calendar",
        "code": "trl_rewards_themis.tools.code:Code",
        "translator": "trl_rewards_themis.tools.translator:Translator",
        "weather": "trl_rewards_themis.tools.weather:Weather",
        "web_search": "trl_rewards_themis.tools.web_search:WebSearch",
        "wiki_search": "trl_rewards_themis.tools.wiki_search:WikiSearch",
    }
