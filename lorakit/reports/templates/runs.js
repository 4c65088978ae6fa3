const keyOf = node => node.dataset.run || node.id.split('-')[0];
const marked = [...document.querySelectorAll('tr[data-run], g[id^="run"]')];
for (const node of marked) {
  node.addEventListener('mouseenter', () => { document.body.classList.add('dim');
    marked.forEach(other => other.classList.toggle('hot', keyOf(other) === keyOf(node))); });
  node.addEventListener('mouseleave', () => { document.body.classList.remove('dim');
    marked.forEach(other => other.classList.remove('hot')); });
}
document.querySelectorAll('th').forEach((head, column) => head.addEventListener('click', () => {
  const body = head.closest('table').tBodies[0], up = head.dataset.up !== '1';
  head.dataset.up = up ? '1' : '0';
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const by = (a, b) => { const [x, y] = [value(a), value(b)];
    if (x === '' || y === '') return (x === '') - (y === '');
    return (up ? 1 : -1) * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y); };
  [...body.rows].sort(by).forEach(row => body.append(row));
}));
