"use strict";
// In tables of class "sorts" a click on a column's head sorts by it; a second click reverses.
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const isNumber = head.classList.contains("number");
      const rows = Array.from(body.rows, (row) => {
        const text = row.cells[column].textContent.trim();
        return { row, key: isNumber ? Number(text) : text };
      });
      const compare = (a, b) => {
        if (!isNumber) return sign * a.key.localeCompare(b.key);
        if (Number.isNaN(a.key) || Number.isNaN(b.key)) {  // undefined values stay last
          return Number.isNaN(a.key) - Number.isNaN(b.key);
        }
        return sign * (a.key - b.key);
      };
      body.append(...rows.sort(compare).map(({ row }) => row));
    });
  });
}
