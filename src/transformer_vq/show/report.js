// Reads out the values nearest to the pointer: a vertical line in the chart, numbers above it.
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const series = JSON.parse(svg.dataset.points);
  const output = svg.parentElement.querySelector("output");
  const cursor = svg.querySelector(".cursor");
  const nearest = (points, x) =>
    points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const at = nearest(series.flatMap(([, points]) => points), x);
    const values = series.map(([label, points]) => {
      const [, , y] = nearest(points, at[0]);
      return series.length > 1 ? `${label} ${y}` : y;
    });
    cursor.setAttribute("transform", `translate(${at[0]})`);
    cursor.style.visibility = "visible";
    output.textContent = `${svg.dataset.x} ${at[1]}: ${values.join(", ")}`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    output.textContent = "";
  });
}
