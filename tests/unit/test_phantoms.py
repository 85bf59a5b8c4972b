"""Phantom films and scenes: repeatable, true, and drawn on the side that the truth names."""

import re

import numpy as np
import pytest

from training.findings import Finding, Truth
from training.phantoms import caption_truth, draw_radiograph, draw_scene, write_report

COUNT = 60


@pytest.fixture(scope="module")
def films():
    return [draw_radiograph(seed, height=128) for seed in range(COUNT)]


def test_film_is_the_same_when_drawn_twice():
    first, second = draw_radiograph(7, 96), draw_radiograph(7, 96)
    assert np.array_equal(first.pixels, second.pixels)
    assert first.truth == second.truth


def test_truth_does_not_depend_on_the_size_of_the_drawing():
    assert draw_radiograph(11, 96).truth == draw_radiograph(11, 300).truth


def test_films_differ_between_seeds(films):
    assert len({film.pixels.tobytes() for film in films}) == COUNT


def test_film_is_eight_bit_gray_of_the_asked_height(films):
    assert {(film.pixels.dtype, film.pixels.ndim, len(film.pixels)) for film in films} == {(np.dtype("uint8"), 2, 128)}


def test_films_have_the_aspects_of_real_films():
    shapes = {round(draw_radiograph(seed, 128).pixels.shape[1] / 128, 2) for seed in range(40)}
    assert min(shapes) < 0.85 < 1.05 < max(shapes)


def test_every_finding_of_a_film_has_a_box_inside_the_picture(films):
    boxes = [finding.box for film in films for finding in film.truth.findings]
    assert len(boxes) > COUNT
    assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in boxes)


def test_cardiothoracic_ratio_agrees_with_the_finding(films):
    verdicts = [(film.truth.find("cardiomegaly") is not None, film.truth.ctr) for film in films]
    assert {enlarged for enlarged, _ in verdicts} == {True, False}
    assert all(ctr >= 0.55 if enlarged else ctr <= 0.47 for enlarged, ctr in verdicts)


def test_large_effusion_is_white_on_the_patients_own_side():
    seen = 0
    for seed in range(300):
        film = draw_radiograph(seed, 96)
        effusion = film.truth.find("pleural effusion")
        if effusion is None or effusion.size != "large" or effusion.side == "bilateral":
            continue
        # The band of the lower lungs; the picture's left half is the patient's right.
        band = film.pixels[50:68].astype(float)
        middle = band.shape[1] // 2
        right, left = band[:, middle - 30 : middle - 14].mean(), band[:, middle + 14 : middle + 30].mean()
        assert (right > left) == (effusion.side == "right"), seed
        seen += 1
    assert seen >= 10


def test_nothing_is_named_that_fluid_hides(films):
    for film in films:
        fluid = film.truth.find("pleural effusion")
        nodule = film.truth.find("nodule")
        if fluid and nodule and fluid.size != "small" and nodule.side in film.truth.sides("pleural effusion"):
            assert nodule.zone == "upper"


def test_bilateral_effusion_counts_on_both_sides():
    truth = Truth(0, "PA", 0.44, (Finding("pleural effusion", side="bilateral", size="small"),))
    assert truth.sides("pleural effusion") == {"left", "right"}
    assert truth.sides("nodule") == frozenset()


def test_caption_states_heart_and_pleura_on_every_frontal_film(films):
    captions = [caption_truth(film.truth) for film in films]
    assert all(re.match(r"frontal chest radiograph\. (cardiomegaly|normal heart size)\. ", text) for text in captions)
    assert all(
        ("no pleural effusion" in text) != bool(film.truth.sides("pleural effusion"))
        for film, text in zip(films, captions, strict=True)
    )


def test_lateral_film_is_captioned_as_lateral():
    assert caption_truth(draw_radiograph(3, 96, lateral=True).truth) == "lateral chest radiograph."


def test_report_names_every_finding_and_labels_it(films):
    for film in films:
        report = write_report(film.truth, np.random.default_rng(film.truth.seed))
        assert report.findings and report.impression
        if film.truth.find("pleural effusion"):
            assert report.labels["Pleural Effusion"] == 1
            assert "effusion" in report.findings and "effusion" in report.impression.lower()


def test_report_keeps_a_hedge_behind_the_sentence_it_leans_on():
    truth = Truth(0, "PA", 0.44, (Finding("consolidation", side="left", zone="lower"),))
    texts = [write_report(truth, np.random.default_rng(seed)).findings for seed in range(60)]
    hedged = [text for text in texts if "This may represent pneumonia." in text]
    assert hedged
    assert all("zone. This may represent pneumonia." in text for text in hedged)


def test_report_speaks_of_bilateral_effusions_in_the_plural():
    truth = Truth(0, "PA", 0.44, (Finding("pleural effusion", side="bilateral", size="small"),))
    texts = [write_report(truth, np.random.default_rng(seed)).findings.lower() for seed in range(20)]
    assert all("bilateral pleural effusions" in text and "a small bilateral" not in text for text in texts)


def test_report_of_a_film_without_findings_says_so():
    report = write_report(Truth(0, "PA", 0.44), np.random.default_rng(0))
    assert report.labels["No Finding"] == 1
    assert report.impression.startswith("No acute cardiopulmonary")


def test_scene_has_five_captions_and_the_first_is_canonical():
    scenes = [draw_scene(seed) for seed in range(40)]
    assert all(len(set(scene.captions)) == 5 for scene in scenes)
    assert {scene.relation for scene in scenes} == {"", "above", "left of"}
    assert all(thing.words in scene.captions[0] for scene in scenes for thing in scene.things)


def test_scene_places_the_first_thing_above_the_second():
    scene = next(s for s in map(draw_scene, range(100)) if s.relation == "above" and s.things[0].colour == "red")
    red = (scene.pixels[..., 0].astype(int) - scene.pixels[..., 1:].max(axis=-1)) > 60
    rows = np.nonzero(red)[0]
    assert rows.mean() < scene.pixels.shape[0] / 2
