import pytest
from trl_rewards_rewardanything.principles import PRINCIPLES, check, compose, is_file, listing, read, words


def test_the_library_covers_every_category_of_the_paper():
    assert {principle.category for principle in PRINCIPLES.values()} == {
        "content",
        "structure",
        "tone",
        "logic",
        "style",
    }
    assert 15 <= len(PRINCIPLES) <= 20


def test_names_stand_for_their_text_and_words_for_themselves():
    assert words("concise") == PRINCIPLES["concise"].text
    assert words(" Prefer rhymes. ") == "Prefer rhymes."


def test_several_principles_are_numbered_by_priority():
    assert compose(["Be brief."]) == "Be brief."
    composed = compose(["Be safe.", "Be brief."])
    assert composed.splitlines()[1:] == ["1. Be safe.", "2. Be brief."]
    assert "lower number decides" in composed


def test_a_misspelt_name_is_told_from_a_principle_in_words():
    check("Prefer rhymes.")
    check("concise")
    check("简洁优先")
    with pytest.raises(ValueError, match="'concis' is no name of the library, did you mean 'concise'"):
        check("concis")
    with pytest.raises(ValueError, match="principle is empty"):
        check(" ")


def test_a_file_is_looked_for_beside_the_recipe(tmp_path):
    (tmp_path / "mine.txt").write_text("Prefer rhymes – always.\n", encoding="utf-8")
    assert is_file("./mine.txt")
    assert is_file("file:mine of mine")
    assert not is_file("Write it like a readme.md")
    assert read("./mine.txt", str(tmp_path)) == "Prefer rhymes – always."
    assert read(f"file:{tmp_path}/mine.txt", "/nowhere") == "Prefer rhymes – always."
    with pytest.raises(OSError):
        read("./yours.txt", str(tmp_path))


def test_the_listing_names_every_principle_with_its_category():
    for name, principle in PRINCIPLES.items():
        assert any(line.split()[:2] == [name, principle.category] for line in listing().splitlines())
