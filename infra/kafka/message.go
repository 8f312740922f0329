package kafka

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/IBM/sarama"
	wkafka "github.com/ThreeDotsLabs/watermill-kafka/v3/pkg/kafka"
	"github.com/ThreeDotsLabs/watermill/message"

	"wharf/infra/journal"
)

// Headers that name a message: Watermill's own, and those of a commit and of a public event.
const (
	uuidHeader   = wkafka.UUIDHeaderKey
	commitHeader = "wharf-commit"
	eventHeader  = "ce_id"
	timeHeader   = "ce_time"
)

// delivery is what a subscriber puts into the context of the messages it hands out.
type delivery struct {
	topic   string
	records []journal.Record
	target  string
}

type (
	deliveryKey struct{}
	recordKey   struct{}
)

// RecordOf is the record that a message of a Subscriber was made of, and its topic. For any other message it is the
// zero Record and an empty topic.
func RecordOf(msg *message.Message) (topic string, r journal.Record) {
	topic, records := RecordsOf(msg)
	if len(records) > 0 {
		r = records[0]
	}
	return topic, r
}

// RecordsOf is all the records that a message of a Subscriber stands for, in order: the one it was made of, and those
// for the same target that waited behind it (see SubscriberConfig.Batch).
func RecordsOf(msg *message.Message) (topic string, records []journal.Record) {
	d, _ := msg.Context().Value(deliveryKey{}).(delivery)
	return d.topic, d.records
}

// TargetOf is the target that a Subscriber hands the message out for; see SubscriberConfig.Targets.
func TargetOf(msg *message.Message) string {
	d, _ := msg.Context().Value(deliveryKey{}).(delivery)
	return d.target
}

// newMessage is the record as Watermill's adapter would hand it out: headers as metadata, the last of a name counts.
// It never fails: what cannot be understood is the reader's business. A record without Watermill's UUID is named by
// its commit, its event, or its place.
func newMessage(topic string, r journal.Record) *message.Message {
	msg := message.NewMessage("", r.Value)
	var commit, event string
	for _, h := range r.Headers {
		switch h.Key {
		case uuidHeader:
			msg.UUID = string(h.Value)
			continue
		case commitHeader:
			commit = string(h.Value)
		case eventHeader:
			event = string(h.Value)
		}
		msg.Metadata[h.Key] = string(h.Value)
	}
	msg.UUID = or(msg.UUID, or(commit, event))
	if msg.UUID == "" {
		msg.UUID = fmt.Sprintf("%s/%d/%d", topic, r.Partition, r.Offset)
	}
	return msg
}

// newCommitMessage is the message whose publication appends exactly the record: see marshaler.
func newCommitMessage(r journal.Record) *message.Message {
	i := slices.IndexFunc(r.Headers, func(h journal.Header) bool { return h.Key == commitHeader })
	uuid := ""
	if i >= 0 {
		uuid = string(r.Headers[i].Value)
	}
	return message.NewMessageWithContext(context.WithValue(context.Background(), recordKey{}, r), uuid, r.Value)
}

// marshaler keeps the conventions of Watermill's adapter (the UUID in a header of its own, metadata as headers), but
// takes key, partition and headers from the record in the message's context: metadata has no order and no repeated
// names, and what decides about a commit must be written exactly as it was made.
type marshaler struct{}

func (marshaler) Marshal(topic string, msg *message.Message) (*sarama.ProducerMessage, error) {
	r, ok := msg.Context().Value(recordKey{}).(journal.Record)
	if !ok {
		return nil, fmt.Errorf("message %s has no record", msg.UUID)
	}
	out := &sarama.ProducerMessage{
		Topic:     topic,
		Partition: r.Partition,
		Headers:   make([]sarama.RecordHeader, 0, 1+len(r.Headers)),
	}
	if r.Key != nil {
		out.Key = sarama.ByteEncoder(r.Key)
	}
	if r.Value != nil {
		out.Value = sarama.ByteEncoder(r.Value)
	}
	out.Headers = append(out.Headers, sarama.RecordHeader{Key: headerName(uuidHeader), Value: []byte(msg.UUID)})
	for _, h := range r.Headers {
		out.Headers = append(out.Headers, sarama.RecordHeader{Key: headerName(h.Key), Value: h.Value})
	}
	return out, nil
}

// headerNames holds the names of headers as bytes. There are two dozen of them, in every record.
var headerNames sync.Map

// headerName is the name as bytes that nobody may change.
func headerName(name string) []byte {
	if b, ok := headerNames.Load(name); ok {
		return b.([]byte)
	}
	b := []byte(name)
	headerNames.Store(name, b)
	return b
}

// withoutUUID leaves out the header that Append adds, where it says nothing that the others do not, so that a record
// is read as it was appended.
func withoutUUID(headers []journal.Header) []journal.Header {
	if len(headers) == 0 || headers[0].Key != uuidHeader {
		return headers
	}
	uuid := string(headers[0].Value)
	for _, h := range headers[1:] {
		if h.Key == commitHeader {
			if string(h.Value) == uuid {
				return headers[1:]
			}
			return headers
		}
	}
	if uuid == "" {
		return headers[1:]
	}
	return headers
}
