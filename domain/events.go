package domain

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
)

// Events is a service's vocabulary: the Go type of every stored name it ever recorded.
//
// A name and what its fields mean never change; fields may be added. A new name is a release of its own: every replica
// has to know it before the first one records it, for one that does not quarantines the stream until it is upgraded.
// So deploy the event and its Evolve first, and the decision that makes it after that.
type Events map[string]reflect.Type

// EventsOf makes a vocabulary of one zero value an event. It panics when two share a stored name: that is a slip of
// the programmer, found by the first test that runs.
func EventsOf(zero ...Event) Events {
	es := Events{}
	for _, e := range zero {
		if _, twice := es[e.EventName()]; twice {
			panic("two events are stored as " + e.EventName())
		}
		es[e.EventName()] = reflect.TypeOf(e)
	}
	return es
}

// Decode is the event that was stored under the name. Unknown fields are ignored, so that a reader may be older than
// the writer; an unknown name or broken JSON is an error.
func (es Events) Decode(name string, data []byte) (Event, error) {
	return es.DecodeBy(json.Unmarshal, name, data)
}

// DecodeBy is Decode by another implementation of encoding/json's Unmarshal, which has to do the same.
func (es Events) DecodeBy(unmarshal func(data []byte, v any) error, name string, data []byte) (Event, error) {
	t, ok := es[name]
	if !ok {
		return nil, fmt.Errorf("no event is stored as %q", name)
	}
	v := reflect.New(t)
	if err := unmarshal(data, v.Interface()); err != nil {
		return nil, fmt.Errorf("decode %s: %w", name, err)
	}
	return v.Elem().Interface().(Event), nil
}

// Encode is the JSON that Decode reads.
func Encode(e Event) ([]byte, error) {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false) // which would make six bytes of one "&"
	if err := encoder.Encode(e); err != nil {
		return nil, fmt.Errorf("encode %s: %w", e.EventName(), err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
