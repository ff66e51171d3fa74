"use strict";
(() => {
  const apply = (slider) => {
    const panel = slider.closest("[data-panel]");
    panel.querySelector("[data-map]").style.opacity = String(slider.value / 100);
    panel.querySelector("output").textContent = slider.value + " %";
  };
  for (const slider of document.querySelectorAll("[data-panel] input[type=range]")) {
    slider.addEventListener("input", () => apply(slider));
    apply(slider); // browsers keep a slider where it was when a page is loaded again
  }
  for (const all of document.querySelectorAll("[data-all] input[type=range]")) {
    const set = () => {
      all.closest("[data-all]").querySelector("output").textContent = all.value + " %";
    };
    all.addEventListener("input", () => {
      set();
      for (const slider of all.closest("section").querySelectorAll("[data-panel] input[type=range]")) {
        slider.value = all.value;
        apply(slider);
      }
    });
    set();
  }
  for (const row of document.querySelectorAll("[data-needs-script]")) {
    row.hidden = false;
  }
})();
