"""A user's own `train_step`: refused where it would be lost, else called."""

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo


class Mixup(keras.Model):
    """Changes the data."""

    def train_step(self, data):
        x, y = data
        return super().train_step((0.5 * (x + x[::-1]), y))


class SecondLoss(keras.Model):
    """Adds a term."""

    def train_step(self, data):
        logs = super().train_step(data)
        return {**logs, "second": 1.0}


class Autoencoder(keras.Model):
    """The pattern of Keras's guides: a loop of its own."""

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(data) - data) ** 2)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(
            zip(gradients, self.trainable_weights, strict=True)
        )
        return {"loss": loss}


class OfAParent(Mixup):
    pass


class Stack(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


OWN = [Mixup, SecondLoss, Autoencoder, OfAParent, Stack]


def make(cls):
    inputs = keras.Input((4,))
    if issubclass(cls, keras.Sequential):
        return cls([inputs, *models.make_layers()])
    return cls(inputs, keras.layers.Dense(3, activation="softmax")(inputs))


def assert_says_what_to_do(message, owner):
    assert f"`{owner}.train_step`" in message
    assert "`compute_loss(" in message
    assert "`return super().train_step(new_data)`" in message
    assert f"Received: {__name__}.{owner}, which" in message


@pytest.mark.parametrize("cls", OWN)
def test_make_variational_refuses_before_it_changes_anything(cls):
    model = make(cls)
    kinds = [type(layer) for layer in model.layers]
    with pytest.raises(TypeError) as error:
        keras_vo.make_variational(model, dense="local_reparam")
    assert_says_what_to_do(
        str(error.value), "Mixup" if cls is OfAParent else cls.__name__
    )
    assert type(model) is cls
    assert [type(layer) for layer in model.layers] == kinds
    loss = "mse" if cls is Autoencoder else "sparse_categorical_crossentropy"
    model.compile("sgd", loss)  # it is what it was
    if cls is not Autoencoder:
        models.fit(model)


@pytest.mark.parametrize("cls", OWN)
def test_a_class_that_would_lose_it_cannot_be_defined(cls):
    with pytest.raises(TypeError) as error:
        type("Both", (keras_vo.VOTrainStep, cls), {})
    assert_says_what_to_do(
        str(error.value), "Mixup" if cls is OfAParent else cls.__name__
    )
    assert "of `Both` would never" in str(error.value)


def test_a_mixin_behind_the_variational_class():
    class Twice:
        def train_step(self, data):
            return super().train_step(data)

    class InFront(Twice, keras_vo.VOTrainStep, keras.Model):
        pass

    with pytest.raises(TypeError, match=r"`Twice.train_step` of `Behind`"):

        class Behind(keras_vo.VOTrainStep, Twice, keras.Model):
            pass

    with pytest.raises(TypeError, match=r"`Mixup.train_step` of `Unaware`"):

        class Unaware(Twice, keras_vo.VOTrainStep, Mixup):
            pass

    class Aware(keras_vo.VOTrainStep, Mixup):
        def train_step(self, data):  # it stands for both
            return super().train_step(data)

    class BehindKeras(keras_vo.VOModel, Twice):  # Keras does not call it either
        pass

    for cls in (InFront, Aware, BehindKeras):
        model = make(cls)
        model.compile(
            models.make_optimizer(),
            "sparse_categorical_crossentropy",
            run_eagerly=True,
        )
        assert "population_loss" in models.fit(model, epochs=1)
    with pytest.raises(TypeError, match=r"`Mixup.train_step` of `More`"):

        class More(InFront, Mixup):
            pass


def test_a_function_that_is_the_models_attribute():
    model = make(keras.Sequential)
    step = model.train_step
    model.train_step = lambda data: step(data)
    with pytest.raises(TypeError, match="as its attribute `train_step`.*after"):
        keras_vo.make_variational(model, dense="low_rank")
    assert type(model) is keras.Sequential
    assert type(model.layers[0]) is keras.layers.Dense


def in_front():
    class Doubled(keras_vo.VOTrainStep, keras.Model):
        def train_step(self, data):
            x, y = data
            return super().train_step((2 * x, y))

    return make(Doubled)


def attribute():
    model = keras_vo.make_variational(make(keras.Model))
    step = model.train_step
    model.train_step = lambda data: step((2 * data[0], data[1]))
    return keras_vo.make_variational(model)  # once more does no harm


@pytest.mark.parametrize("wrapped", [in_front, attribute])
def test_both_cures_change_the_data(wrapped):
    """As if the data were what they make of it."""
    x, y = models.make_data()
    model, plain = wrapped(), keras_vo.make_variational(make(keras.Model))
    plain.set_weights(model.get_weights())
    for each, data in ((model, x), (plain, 2 * x)):
        each.compile(
            models.make_optimizer(),
            "sparse_categorical_crossentropy",
            run_eagerly=wrapped is attribute,
        )
        models.fit(each, data, y, epochs=1)
    np.testing.assert_array_equal(models.weights(model), models.weights(plain))


class OwnLoop(keras.Model):
    def fit(self, x, y, **kwargs):
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(
            zip(gradients, self.trainable_weights, strict=True)
        )


class OwnFunction(keras.Model):
    def make_train_function(self, force=False):
        def function(iterator):
            self.calls += 1
            return self.train_step(next(iterator))

        self.calls, self.train_function = 0, function
        return function


def test_other_places_for_a_loop_of_ones_own_are_called_or_refused():
    """`fit` and `make_train_function` are the user's; gradients are refused."""
    x, y = models.make_data()
    for cls in (OwnLoop, OwnFunction):
        model = keras_vo.make_variational(make(cls))
        model.compile(
            models.make_optimizer(), "sparse_categorical_crossentropy"
        )
        before = models.weights(model)
        if cls is OwnLoop:
            with pytest.raises(ValueError, match=r"`super\(\).train_step\("):
                model.fit(x, y)
            np.testing.assert_array_equal(models.weights(model), before)
        else:
            assert "population_loss" in models.fit(model)
            assert model.calls == 6
