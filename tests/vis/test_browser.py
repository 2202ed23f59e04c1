"""Opens a report in headless Chromium (Debian: ``apt-get install chromium chromium-driver``) and uses it as a reader would."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from geossl.vis import write_report

pytestmark = [pytest.mark.browser, pytest.mark.slow]

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--window-size=1300,1000",
        "--force-device-scale-factor=1",
    ),
)
COLOURS = """
const canvas = arguments[0], data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, seen = new Set();
let opaque = 0;
for (let i = 0; i < data.length; i += 4) {
  if (data[i + 3] < 255) continue;
  opaque++;
  seen.add((data[i] >> 3) << 10 | (data[i + 1] >> 3) << 5 | data[i + 2] >> 3);
}
return [opaque / (data.length / 4), seen.size];
"""
PICTURE = "return arguments[0].toDataURL();"


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium (pip install 'geossl[test]')")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or chromium is None:
        if os.environ.get("GEOSSL_REQUIRE_BROWSER") == "1":
            pytest.fail("GEOSSL_REQUIRE_BROWSER=1 but chromium or chromedriver is not installed")
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    window.set_page_load_timeout(60)
    yield window
    window.quit()


def wait(condition, seconds: float = 20.0):
    """Return the first true value of ``condition()``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not true within {seconds} s")


def point_at(browser, element, x: float, y: float) -> None:
    """Move the pointer to a place in ``element``, in shares of its size, after scrolling it into view."""
    from selenium.webdriver import ActionChains

    browser.execute_script(
        "document.documentElement.style.scrollBehavior = 'auto'; arguments[0].scrollIntoView({block: 'center'})", element
    )
    size = element.size
    ActionChains(browser, duration=20).move_to_element_with_offset(
        element, int((x - 0.5) * size["width"]), int((y - 0.5) * size["height"])
    ).perform()


def test_report_in_a_browser(browser, run):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    browser.get(f"file://{write_report(run)}")
    find = lambda css: browser.find_element(By.CSS_SELECTOR, css)  # noqa: E731
    wait(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "yes")

    # Every panel is there, with a title.
    for name in ("curves", "reconstructions", "map", "neighbors", "probes", "setup"):
        assert find(f"#{name} h2").text
    assert find("#title").text == "Point-MAE on objects"
    assert "points above" in find("#verdict").text
    assert len(browser.find_elements(By.CSS_SELECTOR, "#curves svg")) == 6
    assert len(browser.find_elements(By.CSS_SELECTOR, "#probes .own")) == 1

    # A cloud is drawn and shaded, and turns when it is dragged.
    cloud = find(".object .stage canvas")
    point_at(browser, cloud, 0.5, 0.5)
    filled, shades = wait(lambda: (lambda seen: seen if seen[0] > 0.02 else None)(browser.execute_script(COLOURS, cloud)))
    assert filled < 0.9
    assert shades > 50
    ActionChains(browser, duration=20).click_and_hold(cloud).move_by_offset(3, 0).perform()  # held: no longer turns by itself
    wait(lambda: browser.execute_script("return arguments[0].view.state.held", cloud))
    time.sleep(0.2)
    before = browser.execute_script(PICTURE, cloud)
    ActionChains(browser, duration=20).move_by_offset(50, 12).release().perform()
    wait(lambda: browser.execute_script(PICTURE, cloud) != before)

    # The error button repaints the prediction.
    result = browser.find_elements(By.CSS_SELECTOR, ".object .stage canvas")[2]
    before = browser.execute_script(PICTURE, result)
    find("#reconstructions [data-key=error]").click()
    wait(lambda: browser.execute_script(PICTURE, result) != before)
    assert "nearest input point" in find("#reconstructions .ramp").text

    # Features, saliency and what the teacher saw stand beside it.
    images = browser.find_elements(By.CSS_SELECTOR, ".object .depth img")
    assert [browser.execute_script("return arguments[0].naturalWidth", image) for image in images] == [224] * 3
    assert len(browser.find_elements(By.CSS_SELECTOR, ".object:first-child canvas")) == 5

    # One cursor reads all curves.
    charts = browser.find_elements(By.CSS_SELECTOR, "#curves .chart svg")
    point_at(browser, charts[0], 0.5, 0.5)
    readouts = wait(lambda: [o.text for o in browser.find_elements(By.CSS_SELECTOR, "#curves output") if o.text.startswith("step")])
    assert len(readouts) >= 5

    # Pointing at the map shows the object and its neighbours.
    plot = find("#map canvas")
    point_at(browser, plot, 0.5, 0.5)
    place = browser.execute_script(
        "const m = JSON.parse(document.getElementById('data').textContent).map, c = document.querySelector('#map canvas');"
        "return [0, 1].map((k) => { const s = [c.clientWidth, c.clientHeight][k], p = m.tsne[7][k] * (k ? -1 : 1);"
        " return (s / 2 + p * (s / 2 - 26)) / s; })"
    )
    point_at(browser, plot, *place)
    wait(lambda: find("#tip").is_displayed())
    assert find("#tip b").text.startswith("object </script>")
    assert wait(lambda: browser.execute_script(COLOURS, find("#tip canvas"))[1] > 20)

    # Dark and light differ, nothing was fetched and nothing went wrong.
    shown = lambda: browser.execute_script("return getComputedStyle(document.body).backgroundColor")  # noqa: E731
    before = shown()
    browser.execute_script("arguments[0].click()", find("#theme"))
    assert shown() != before
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_events_in_a_browser(browser, events_run):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    browser.get(f"file://{write_report(events_run)}")
    find = lambda css: browser.find_element(By.CSS_SELECTOR, css)  # noqa: E731
    wait(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "yes")
    for name in ("curves", "events", "segmentation", "probes", "setup"):
        assert find(f"#{name} h2").text
    assert not browser.find_elements(By.CSS_SELECTOR, "#reconstructions *, #map *")

    # Every view is drawn: energy, tokens, reconstruction, true and predicted class, embeddings twice, attention.
    titles = [p.text for p in browser.find_elements(By.CSS_SELECTOR, "#events article:first-child .views p")]
    assert len(titles) == 8
    assert {"energy", "tokens: visible, hidden", "true class", "predicted class"} <= set(titles)
    for canvas in browser.find_elements(By.CSS_SELECTOR, "#events article:first-child canvas"):
        point_at(browser, canvas, 0.5, 0.5)
        wait(lambda canvas=canvas: browser.execute_script(COLOURS, canvas)[1] > 20)

    # Clicking a point asks for the attention of its token.
    attention = find("#events article:first-child canvas.pick")
    text = attention.find_element(By.XPATH, "../following-sibling::p")
    before = text.text
    assert before.startswith("attention of token ")
    place = browser.execute_script(
        "const c = arguments[0]; c.view.state.held = true; c.view.draw();"
        "for (let k = 0; k < c.width * c.height; k += 7) if (scratch.id[k] >= 0)"
        " return [(k % c.width) / c.width, Math.floor(k / c.width) / c.height];",
        attention,
    )
    point_at(browser, attention, *place)
    ActionChains(browser, duration=20).click().perform()
    wait(lambda: text.text != before)

    assert len(browser.find_elements(By.CSS_SELECTOR, "#segmentation .scores tbody tr")) == 5
    assert len(browser.find_elements(By.CSS_SELECTOR, "#segmentation .confusion .cell")) == 16
    assert len(browser.find_elements(By.CSS_SELECTOR, "#probes .own")) == 1
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
