// Hovering a kernel's point, list item or table row marks the others; a click on a table's head sorts by that column.
for (const kind of ["mouseover", "mouseout"])
  document.addEventListener(kind, event => {
    const one = event.target.closest("[data-n]");
    if (one)
      for (const other of document.querySelectorAll(`[data-n="${one.dataset.n}"]`))
        other.classList.toggle("lit", kind === "mouseover");
  });
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.classList.add("sortable");
  table.tHead.addEventListener("click", event => {
    const column = event.target.closest("th").cellIndex;
    const value = row => row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => parseFloat(value(a)) - parseFloat(value(b))
                                               || value(a).localeCompare(value(b), undefined, {numeric: true}));
    const already = rows.every((row, i) => row === body.rows[i]);
    body.append(...(already ? rows.reverse() : rows));
  });
}
