"use strict";
(() => {
  document.documentElement.classList.add("js");

  // Images: three views of every pair.
  const gallery = document.getElementById("gallery");
  if (gallery) {
    const buttons = [...document.querySelectorAll("[data-view]")];
    const show = (view) => {
      gallery.dataset.mode = view;
      document.querySelector(".controls").classList.toggle("shows-difference", view === "difference");
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.view === view));
    };
    for (const button of buttons) button.addEventListener("click", () => show(button.dataset.view));
    for (const cut of gallery.querySelectorAll(".cut")) {
      cut.addEventListener("input", () => cut.parentElement.style.setProperty("--cut", `${cut.value}%`));
    }
    const gain = document.getElementById("gain");
    const amplify = () => {
      gallery.style.setProperty("--gain", 2 ** gain.value);
      document.getElementById("gain-value").textContent = `× ${2 ** gain.value}`;
    };
    gain.addEventListener("input", amplify);
    const size = document.getElementById("size");
    const resize = () => gallery.style.setProperty("--size", `${size.value}px`);
    size.addEventListener("input", resize);
    amplify();
    resize();
    show("slider");
  }

  // Tables: rows that hold every word of the search.
  for (const box of document.querySelectorAll(".searchable")) {
    const rows = [...box.querySelectorAll("tbody tr")];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const input = box.querySelector("input[type=search]");
    const count = box.querySelector("output");
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, index) => {
        row.hidden = !words.every((word) => texts[index].includes(word));
        shown += row.hidden ? 0 : 1;
      });
      count.textContent = words.length ? `${shown} of ${rows.length}` : `${rows.length}`;
    };
    input.addEventListener("input", filter);
    filter();
  }

  // Tables: a click on a heading sorts, a second one the other way round; what is missing stays last.
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      heading.tabIndex = 0;
      const sort = () => {
        const down = heading.getAttribute("aria-sort") === "ascending";
        for (const other of headings) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => {
          const cell = row.cells[column];
          if (cell.dataset.value === undefined) return cell.textContent.trim();
          return cell.dataset.value === "" ? null : Number(cell.dataset.value);
        };
        const compare = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
        const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
        rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : down ? compare(b, a) : compare(a, b)));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      };
      heading.addEventListener("click", sort);
      heading.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          sort();
        }
      });
    });
  }
})();
