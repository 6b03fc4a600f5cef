"""Losses, bounds, texts and pictures as recorded, in a process of its own: fp32, one thread."""
from conftest import run

import config


def test_golden():
    assert "cases are as recorded" in run("-m", "experiments.golden").stdout


def test_the_largest_difference_is_found_and_what_is_asked_for_recorded(tmp_path, monkeypatch,
                                                                        capsys):
    monkeypatch.setattr(config, "AMP", config.AMP)         # which golden.py sets
    from experiments import golden
    monkeypatch.setattr(golden, "PATH", tmp_path / "golden.json")
    golden.PATH.write_text("{}")
    values = {"a.loss": {"losses": [1.0, 2.0], "bound": 4.0}, "a.text": ["x"],
              "b.picture": [0.5, 0.25]}
    monkeypatch.setattr(golden, "cases", values.items)

    def said(*args):
        """The lines that are printed, the one that ends it last."""
        try:
            golden.main(list(args))
        except SystemExit as error:
            print(error)
        return capsys.readouterr().out.splitlines()

    said("--record")
    assert said() == ["all 3 cases are as recorded"]
    values |= {"a.loss": {"losses": [1.0, 2.02], "bound": 4.0}, "a.text": ["y"],
               "b.picture": [0.5, 0.375], "b.new": [1.0]}
    differ = ["a.loss: differs by 1.0e-02", "a.text: differs by 1.0e+00"]
    assert said() == [*differ, "b.picture: differs by 1.2e-01", "b.new: differs by 1.0e+00",
                      "4 of 3 cases differ"]
    said("--record=b.")
    assert said() == [*differ, "2 of 4 cases differ"]
    said("--record")
    assert said() == ["all 4 cases are as recorded"]
