"""The page of tools/xray.py in a browser."""

import shutil

import pytest

from tests.xray_pages import E, K, hostile_page, page_and_data, small_run


@pytest.fixture(scope="module")
def trained(play, tmp_path_factory):
    return small_run(play, tmp_path_factory.mktemp("xray"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return hostile_page(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def browser():
    try:
        from selenium import webdriver
    except ImportError:
        pytest.skip("no selenium")
    driver, chrome = (
        shutil.which("chromedriver"),
        next(
            filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
        ),
    )
    if not driver or not chrome:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    browser = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=driver)
    )
    yield browser
    browser.quit()


def test_in_a_browser(trained, browser):
    _, data = page_and_data(trained[0] / "xray.html")
    for width in (1000, 400):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((trained[0] / "xray.html").as_uri())
        assert browser.get_log("browser") == []
        overflowing = browser.execute_script("""
            const width = document.documentElement.clientWidth
            return [...document.querySelectorAll("body *")]
                .filter(node => !node.closest(".box table"))
                .filter(node => node.getBoundingClientRect().right > width + 0.5)
                .map(node => node.outerHTML.slice(0, 80))""")
        assert not overflowing
        widths = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert widths[0] == width >= widths[1]
    seen = {}
    buttons = browser.find_elements("css selector", "#layers button")
    assert [b.text for b in buttons] == ["layer 1", "layer 3"]
    for i in (0, 1):
        if i:
            buttons[i].click()
        assert [b.get_attribute("aria-pressed") for b in buttons] == [
            str(j == i).lower() for j in (0, 1)
        ]
        shown = browser.execute_script("""
            return [...document.querySelectorAll("#text span")].map(node =>
                [node.textContent, getComputedStyle(node).backgroundColor, node.title])""")
        first = data["text"]["expert"][i][::K]
        assert [text.removesuffix("\n").replace("⏎", "\n") for text, _, _ in shown] == data["text"][
            "tokens"
        ]
        colours = dict(zip(first, (colour for _, colour, _ in shown), strict=True))
        assert [colour for _, colour, _ in shown] == [colours[e] for e in first]
        assert len(set(colours.values())) == len(colours) > 1
        legend = browser.execute_script("""
            return [...document.querySelectorAll("#legend button")].map(node =>
                getComputedStyle(node).backgroundColor)""")
        assert all(legend[e] == colour for e, colour in colours.items())
        for n, (_, _, title) in enumerate(shown):
            experts, gates = (
                data["text"][name][i][n * K : n * K + K] for name in ("expert", "gate")
            )
            assert all(
                f"expert {e}: gate {gate}" in title for e, gate in zip(experts, gates, strict=True)
            )
        cells = browser.execute_script("""return ["pairs", "load", "knockout", "same"].map(id =>
            [...document.querySelectorAll(`#${id} td`)].map(td => td.textContent))""")
        pairs = [value for row in data["layers"][i]["pairs"] for value in row]
        assert [None if cell == "–" else float(cell) for cell in cells[0]] == [
            None if value is None else pytest.approx(value, abs=0.0051) for value in pairs
        ]
        assert list(map(float, cells[1])) == pytest.approx(
            [100 * v for row in data["layers"] for v in row["load"]], abs=0.051
        )
        assert list(map(float, cells[2])) == pytest.approx(
            [v for row in data["layers"] for v in row["knockout"]], abs=0.00051
        )
        assert float(cells[3][0]) == pytest.approx(100 * data["layers"][0]["same"], abs=0.051)
        shades = browser.execute_script(
            """return [...document.querySelectorAll("#load td")].map(td => td.style.background)"""
        )
        for value, shade in zip(
            (v for row in data["layers"] for v in row["load"]), shades, strict=True
        ):
            assert value == 1 / E or ("--more" if value > 1 / E else "--less") in shade
        favourites = browser.execute_script("""
            return [...document.querySelectorAll("#favourites td:last-child")].map(td =>
                td.children.length)""")
        assert favourites == [len(row) for row in data["layers"][i]["favourites"]]
        seen[i] = [colour for _, colour, _ in shown]
    assert seen[0] != seen[1]
    legend = browser.find_elements("css selector", "#legend button")
    legend[1].click()  # only its tokens stay coloured
    faint = browser.execute_script("""
        return [...document.querySelectorAll("#text span")].map(node =>
            node.classList.contains("faint"))""")
    assert faint == [e != 1 for e in first] and legend[1].get_attribute("aria-pressed") == "true"
    assert browser.get_log("browser") == []


def test_html_in_a_browser(hostile, browser):
    browser.get(hostile[0].as_uri())
    assert browser.get_log("browser") == []
    assert not browser.find_elements("css selector", "img, p + b, #text b")
    assert str(hostile[1]) in browser.find_element("css selector", "dl").text
    assert "no pairs" in browser.find_element(
        "id", "about_pairs"
    ).text and not browser.find_elements("id", "pairs")
