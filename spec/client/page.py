"""The chat page in headless Chromium, against a scripted server (page_spec.lua)."""

import shutil
import sys

from playwright.sync_api import expect, sync_playwright

url, scenario = sys.argv[1:3]
expect.set_options(timeout=60_000)  # of its 5 s a busy machine takes more


def say(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def set_up(page, **settings):
    page.click("#settings summary")
    for name, value in settings.items():
        if name == "thinking":
            page.select_option("#thinking", value)
        else:
            page.fill("#" + name, value)
            page.dispatch_event("#" + name, "change")
    page.click("#settings summary")


def chat(page):
    expect(page.locator("#model")).to_have_text("demo-model")
    set_up(page, thinking="on", temperature="0.5", system="Be brief.")
    say(page, "Hi <b>there</b>")
    expect(page.locator(".user .text")).to_have_text("Hi <b>there</b>")
    # While it streams: reasoning is folded, there is a stop button, and text grows.
    turn = page.locator(".assistant").first
    expect(turn.locator("summary")).to_have_text("Thinking …")
    expect(page.locator("#send")).to_have_text("Stop")
    expect(turn.locator(".text")).to_contain_text("Hello")
    assert "The end." not in turn.locator(".text").inner_text()
    expect(turn.locator(".text")).to_contain_text("The end.")
    expect(page.locator("#send")).to_have_text("Send")
    assert turn.locator("details.reasoning").get_attribute("open") is None
    assert not turn.locator(".reasoning div").is_visible()
    turn.locator("summary").click()
    expect(turn.locator(".reasoning div")).to_have_text("I ponder <i>deeply</i>.")
    assert turn.locator(".reasoning div").is_visible()
    # Markdown is dressed, markup stays text.
    expect(turn.locator("strong")).to_have_text("bold")
    expect(turn.locator("li")).to_have_text(["one", "two"])
    expect(turn.locator("pre code")).to_have_text("<script>document.title = 1</script>")
    expect(turn.locator(".text")).to_contain_text("<img src=x onerror=document.title=2>")
    assert page.locator("#log img, #log script, #log i, #log b").count() == 0
    assert page.title() == "demo-model", page.title()
    speed = turn.locator(".speed").inner_text()
    assert "s to first token" in speed and "tok/s" in speed and "tokens" in speed, speed
    page.click("#fresh")
    assert page.locator("#log > *").count() == 0


def tools(page):
    set_up(page, tools='[{"type": "function", "function": {"name": "weather", "parameters": {'
           '"type": "object", "properties": {"city": {"type": "string"}}}}}]')
    say(page, "How is the weather?")
    expect(page.locator(".call b")).to_have_text("weather")
    expect(page.locator(".call pre")).to_have_text('{\n  "city": "<u>Paris</u>"\n}')
    expect(page.locator("#send")).to_have_text("Send result")
    say(page, "sunny")
    expect(page.locator(".tool .text")).to_have_text("sunny")
    expect(page.locator(".assistant .text").last).to_have_text("It is sunny.")
    expect(page.locator("#send")).to_have_text("Send")


def stop(page):
    say(page, "Count")
    expect(page.locator(".assistant .text")).to_contain_text("one")
    page.click("#send")
    expect(page.locator(".speed")).to_contain_text("stopped")
    expect(page.locator("#send")).to_have_text("Send")
    assert "hundred" not in page.locator(".assistant .text").inner_text()
    # Begins again, is stopped by a new chat, and the next one answers.
    page.click("#retry")
    expect(page.locator("#send")).to_have_text("Stop")
    page.click("#fresh")
    expect(page.locator("#send")).to_have_text("Send")
    say(page, "Again")
    expect(page.locator(".assistant .text")).to_have_text("Done.")


def errors(page):
    set_up(page, temperature="-1")
    say(page, "Hi")
    expect(page.locator(".error")).to_contain_text("temperature")
    set_up(page, temperature="")
    page.click("#retry")
    expect(page.locator(".error")).to_contain_text("broken weight")
    expect(page.locator(".assistant .text")).to_contain_text("It st")


def key(page):
    assert page.locator("#settings").get_attribute("open") is not None
    say(page, "Hi")
    expect(page.locator(".error")).to_contain_text("API key")
    page.fill("#key", "secret")
    page.dispatch_event("#key", "change")
    expect(page.locator("#model")).to_have_text("demo-model")
    page.click("#retry")
    expect(page.locator(".assistant .text")).to_have_text("Open.")
    page.reload()
    assert page.input_value("#key") == "secret"


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"),
                                         args=["--no-sandbox"])
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page, complaints = context.new_page(), []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda problem: complaints.append(str(problem)))
        page.on("request", lambda request: request.url.startswith((url, "data:"))
                or complaints.append(request.url))
        page.goto(url)
        globals()[scenario](page)
        if len(sys.argv) > 3:
            page.screenshot(path=f"{sys.argv[3]}/{scenario}-{scheme}.png")
        complaints = [c for c in complaints if "the server responded with a status of 4" not in c]
        assert not complaints, complaints
        context.close()
    browser.close()
print("ok")
