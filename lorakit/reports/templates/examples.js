document.querySelectorAll('span.image').forEach(chip => { const picture =
document.getElementById(chip.dataset.image);
  for (const [name, on] of [['mouseenter', true], ['mouseleave', false]])
    chip.addEventListener(name, () => picture.classList.toggle('hot', on)); });
