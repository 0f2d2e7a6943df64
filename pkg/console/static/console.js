// Counts down between two loads of the page. Without it the page says the same, as of when it was made.
"use strict";
(() => {
  const made = Date.parse(document.documentElement.dataset.now);
  const began = performance.now(); // the browser's own clock may be wrong
  const two = (n) => String(n).padStart(2, "0");
  const span = (s) => {
    if (s <= 0) return "over";
    if (s < 60) return `${s} s`;
    if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
    return `${Math.floor(s / 3600)} h ${two(Math.floor(s / 60) % 60)} min`;
  };
  const left = [...document.querySelectorAll("[data-until]")].map((e) => [e, Date.parse(e.dataset.until)]);
  const tick = () => {
    const now = made + performance.now() - began;
    for (const [e, until] of left) e.textContent = span(Math.ceil((until - now) / 1000));
  };
  if (left.length) setInterval(tick, 1000);
})();
