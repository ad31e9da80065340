from loraplex import settings_page
from loraplex.flags import GROUPS, setting_fields


def test_the_page_of_settings_is_current() -> None:
    assert settings_page.main(["--check"]) == 0, "run 'make settings'"


def test_every_setting_is_on_the_page() -> None:
    text = settings_page.page()
    for group in GROUPS:
        for field in setting_fields(group):
            assert f"`{field.env_name}`" in text
