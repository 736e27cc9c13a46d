"use strict";
// Buttons choose the percentile that is shown.
for (const button of document.querySelectorAll("[data-show]"))
  button.addEventListener("click", () => { document.documentElement.className = "show-" + button.dataset.show; });

// A click on a column sorts its table by the column, the largest value first; a second click, the smallest first.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[table.tBodies.length - 1];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (head.classList.contains("bars")) return;
    head.addEventListener("click", () => {
      const down = !("down" in head.dataset);
      for (const other of heads) { delete other.dataset.down; delete other.dataset.up; }
      head.dataset[down ? "down" : "up"] = "";
      const value = (row) => column ? Number(row.cells[column].dataset.sort) : row.cells[0].textContent;
      const order = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0);
      const rows = [...body.rows].sort((a, b) => column === 0 !== down ? -order(a, b) : order(a, b));
      body.append(...rows);
    });
  });
}

// A chart shows its values at the pointer's position.
const tip = document.getElementById("tip");
for (const picture of document.querySelectorAll("svg[data-columns]")) {
  const columns = JSON.parse(picture.dataset.columns);
  const pointer = picture.querySelector(".pointer");
  picture.addEventListener("pointermove", (event) => {
    if (!columns.length) return;
    const box = picture.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * picture.viewBox.baseVal.width;
    const [at, lines] = columns.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    pointer.setAttribute("x1", at);
    pointer.setAttribute("x2", at);
    pointer.removeAttribute("hidden");
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.setProperty("left", Math.max(left, 0) + "px");
    tip.style.setProperty("top", Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px");
  });
  picture.addEventListener("pointerleave", () => { tip.hidden = true; pointer.setAttribute("hidden", ""); });
}
