"use strict";
// Runs last: fills the panels, the links and the theme.

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  redrawAll(); charts.forEach((chart) => chart.draw()); dispatchEvent(new Event("themechange"));
}
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
document.documentElement.dataset.theme = new URLSearchParams(location.search).get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
for (const panel of [headerPanel, curvesPanel, reconstructionsPanel, eventsPanel, segmentationPanel, mapPanel, neighborsPanel, probesPanel, tokenProbePanel, setupPanel]) panel();
for (const section of document.querySelectorAll("section")) if (section.childElementCount) $("links").append(el("a", { href: "#" + section.id }, section.dataset.title));
const reading = new IntersectionObserver((entries) => entries.forEach((e) => document.querySelector(`.links a[href="#${e.target.id}"]`)?.classList.toggle("here", e.isIntersecting)), { rootMargin: "-45% 0px -50% 0px" });
for (const section of document.querySelectorAll("section")) reading.observe(section);
requestAnimationFrame(frame);
document.documentElement.dataset.ready = "yes";
