"""The page at /, in headless Chromium."""

import contextlib
import os
import shutil
import signal

import pytest
import serving
from flax import nnx

import bert_jax

pytestmark = pytest.mark.browser
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def expect(locator):
    from playwright import sync_api

    return sync_api.expect(locator)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a small model with both heads, open and ready; what it logs as an error fails the test."""
    from playwright.sync_api import sync_playwright  # of the extra `browser`; asked for, it must be there

    assert BROWSER, "there is no Chromium: apt-get install chromium"
    folder = tmp_path_factory.mktemp("model")
    config = bert_jax.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                 max_position_embeddings=32)  # fmt: skip
    bert_jax.BertForPreTraining(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
    bert_jax.Tokenizer.from_pretrained("bert-mini-cased").save_pretrained(folder)
    process, port = serving.start(folder)
    try:
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
            errors, asked = [], []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            expected = "Failed to load resource: the server responded with a status of 422 (Unprocessable Entity)"
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector("#attention svg")
            yield page
            assert set(errors) <= {expected}  # of the mistake that is made on purpose
            assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in asked)
            if where := os.environ.get("BERT_JAX_SCREENSHOT"):
                page.screenshot(path=where, full_page=True)
            browser.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_fillings_are_bars_and_fill_the_mask(page):
    words = page.locator("#fillings button span:first-child").all_text_contents()
    assert len(words) == 5
    widths = [bar.bounding_box()["width"] for bar in page.locator("#fillings .bar").all()]
    assert widths == sorted(widths, reverse=True)
    page.locator("#fillings button").first.click()
    expect(page.locator("#fillings button")).to_have_count(0)
    assert "[MASK]" not in page.input_value("#text")
    assert words[0].removeprefix("##") in page.input_value("#text")


def test_several_masks_and_the_keyboard(page):
    page.fill("#text", "The [MASK] of [MASK].")
    page.focus("#text")
    page.keyboard.press("Enter")
    expect(page.locator("#fillings ol")).to_have_count(2)
    page.locator("#fillings ol").nth(1).locator("button").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#fillings ol")).to_have_count(1)
    assert page.input_value("#text").startswith("The [MASK] of")
    assert page.input_value("#text").count("[MASK]") == 1


def test_attention_of_a_layer_a_head_and_a_token(page):
    page.fill("#text", "She went home [MASK].")
    page.locator("#panel-mask .go").click()
    page.get_by_label("Attention of went").wait_for()
    everything = page.locator("#attention line").count()
    token = page.locator("#attention .token").nth(2)
    token.focus()
    page.keyboard.press("Enter")
    assert 0 < page.locator("#attention line").count() < everything
    assert page.locator("#attention .chosen").text_content() == "went"
    before = page.locator("#attention").inner_html()
    page.select_option("#head", "1")
    assert page.locator("#attention").inner_html() != before
    with page.expect_response("**/v1/attention") as answer:
        page.select_option("#layer", "0")
    assert answer.value.request.post_data_json == {"text": "She went home [MASK].", "layer": 0}


def test_a_late_answer_does_not_replace_a_newer_one(page):
    """The first request's answer is held back until the second has been shown."""
    from playwright.sync_api import Error

    late = []
    page.route("**/v1/attention", lambda route: late.append(route) if not late else route.continue_())
    page.fill("#text", "This comes first [MASK].")
    with page.expect_request("**/v1/attention"):
        page.locator("#panel-mask .go").click()
    page.fill("#text", "This comes second [MASK].")
    page.locator("#panel-mask .go").click()
    page.get_by_label("Attention of second").wait_for()
    with contextlib.suppress(Error):  # it is gone, if the page has called it off
        late[0].continue_()
    page.unroute("**/v1/attention")
    page.wait_for_timeout(500)
    assert page.get_by_label("Attention of second").count() == 1
    assert page.text_content("#mask-message") == ""


def test_a_mistake_is_said(page):
    page.fill("#text", "[MASK] " * 40)
    page.locator("#panel-mask .go").click()
    page.wait_for_selector("#mask-message.error")
    assert "tokens" in page.text_content("#mask-message")


def test_the_second_tab_judges_by_keyboard(page):
    page.focus("#tab-mask")
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-next").is_visible()
    assert page.locator("#panel-mask").is_hidden()
    page.focus("#second")
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_contain_text("%")
    page.focus("#tab-next")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#panel-mask").is_visible()


def test_it_fits_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_documentation_of_the_routes(page):
    """Swagger UI comes from this server; the fixture allows no other address."""
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(page.url + "docs")
    page.locator(".opblock-summary-path", has_text="/v1/embeddings").wait_for()
    assert page.locator(".opblock").count() >= 12
    assert errors == []
