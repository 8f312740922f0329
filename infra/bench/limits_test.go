//go:build bench

package bench_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/ThreeDotsLabs/watermill"
	wkafka "github.com/ThreeDotsLabs/watermill-kafka/v3/pkg/kafka"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	"google.golang.org/protobuf/encoding/protowire"

	"wharf/domain/orders"
	"wharf/infra/journal"
	"wharf/infra/web"
)

// rawRun publishes records of the sample's bytes, each under a key and an id of its own, and waits until they are read
// back. The id tells whose record it is.
func rawRun(t *testing.T, b broker, sample journal.Record, l load) stat {
	t.Helper()
	admin, end := b.connect(t)
	defer end()
	topic := "raw-" + uuid.NewString()[:8]
	defer b.topics(t, admin, topic)()

	conf := wkafka.DefaultSaramaSyncPublisherConfig()
	conf.Producer.RequiredAcks = sarama.WaitForAll
	conf.Producer.Idempotent = true
	conf.Net.MaxOpenRequests = 1
	publisher, err := wkafka.NewPublisher(wkafka.PublisherConfig{Brokers: b.addrs, OverwriteSaramaConfig: conf,
		Marshaler: wkafka.NewWithPartitioningMarshaler(func(_ string, m *message.Message) (string, error) { return m.UUID, nil }),
	}, watermill.NopLogger{})
	if err != nil {
		t.Fatal(err)
	}
	defer publisher.Close()

	back := make([]chan int64, l.callers)
	for i := range back {
		back[i] = make(chan int64, 1)
	}
	ctx, cancel := context.WithTimeout(t.Context(), warms()+runs()+time.Minute)
	defer cancel()
	consumer, err := sarama.NewConsumer(b.addrs, sarama.NewConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()
	var reading sync.WaitGroup
	defer reading.Wait()
	for p := range int32(partitions) {
		pc, err := consumer.ConsumePartition(topic, p, sarama.OffsetOldest)
		if err != nil {
			t.Fatal(err)
		}
		defer pc.AsyncClose()
		reading.Go(func() {
			for m := range pc.Messages() {
				for _, h := range m.Headers {
					if string(h.Key) == wkafka.UUIDHeaderKey {
						w, n := ownerOf(string(h.Value))
						back[w] <- n
					}
				}
			}
		})
	}

	sent := make([]int64, l.callers)
	s, err := drive(l, func(w int) error {
		sent[w]++
		m := message.NewMessage(idOf(w, sent[w]), sample.Value)
		for _, h := range sample.Headers {
			m.Metadata[h.Key] = string(h.Value)
		}
		if err := publisher.Publish(topic, m); err != nil {
			return err
		}
		select {
		case n := <-back[w]:
			if n != sent[w] {
				return fmt.Errorf("caller %d has read back record %d and not %d", w, n, sent[w])
			}
			return nil
		case <-ctx.Done():
			return errors.New("a record was not read back")
		}
	})
	if err != nil {
		t.Fatalf("publish and read back: %v", err)
	}
	return s
}

// idOf is a UUID that names a caller and the number of its record, ownerOf reads it.
func idOf(w int, n int64) string { return fmt.Sprintf("01980000-%04x-7000-8000-%012x", w, n) }

func ownerOf(id string) (w int, n int64) {
	caller, _ := strconv.ParseInt(id[9:13], 16, 32)
	n, _ = strconv.ParseInt(id[24:], 16, 64)
	return int(caller), n
}

// plainHTTPRun has orders posted to a handler that does nothing but read and answer JSON, on the shop's own server.
func plainHTTPRun(t *testing.T, c client) stat {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", func(w http.ResponseWriter, r *http.Request) {
		var order struct {
			Customer string        `json:"customer"`
			Lines    []orders.Line `json:"lines"`
		}
		if err := json.NewDecoder(r.Body).Decode(&order); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]any{"id": r.Header.Get("Idempotency-Key"), "version": len(order.Lines)})
	})
	return serveFor(t, mux, c)
}

// serveFor serves while the client does its work.
func serveFor(t *testing.T, h http.Handler, c client) stat {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- web.Serve(ctx, l, h) }()
	defer func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	return c.run(t, "http://"+l.Addr().String()+"/orders")
}

// rawConsume reads a log of orders that were placed, decodes what a fold cannot do without, and puts it into maps.
func rawConsume(t *testing.T, b broker, topic string, n int) stat {
	t.Helper()
	consumer, err := sarama.NewConsumer(b.addrs, sarama.NewConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()
	ends := endsOf(t, b, topic)
	began := time.Now()
	got := make([]map[string]orders.Placed, partitions)
	var all sync.WaitGroup
	for p := range int32(partitions) {
		got[p] = map[string]orders.Placed{}
		if ends[p] == 0 {
			continue
		}
		pc, err := consumer.ConsumePartition(topic, p, sarama.OffsetOldest)
		if err != nil {
			t.Fatal(err)
		}
		defer pc.AsyncClose()
		all.Go(func() {
			for m := range pc.Messages() {
				var placed orders.Placed
				if err := json.Unmarshal(dataOf(m.Value), &placed); err != nil {
					t.Errorf("%s partition %d offset %d: %v", topic, p, m.Offset, err)
					return
				}
				got[p][string(m.Key)] = placed
				if m.Offset == ends[p]-1 {
					return
				}
			}
		})
	}
	all.Wait()
	took := time.Since(began)
	keys := 0
	for _, m := range got {
		keys += len(m)
	}
	if keys != n {
		t.Fatalf("%d streams were read, not %d", keys, n)
	}
	return statOf(n, took, nil)
}

// dataOf is the data of the one event in a frame: field 4 of field 1.
func dataOf(frame []byte) []byte { return field(field(frame, 1), 4) }

func field(b []byte, want protowire.Number) []byte {
	for len(b) > 0 {
		n, kind, size := protowire.ConsumeTag(b)
		if n == want {
			v, _ := protowire.ConsumeBytes(b[size:])
			return v
		}
		b = b[size:]
		b = b[protowire.ConsumeFieldValue(n, kind, b):]
	}
	return nil
}

// endsOf is where the partitions of the topic end.
func endsOf(t *testing.T, b broker, topic string) []int64 {
	t.Helper()
	c, end := b.connect(t)
	defer end()
	ends := make([]int64, partitions)
	for p := range ends {
		var err error
		if ends[p], err = c.Reader(topic).End(t.Context(), int32(p)); err != nil {
			t.Fatal(err)
		}
	}
	return ends
}

// remove deletes topics. That one stays is no harm.
func (b broker) remove(t *testing.T, names []string) {
	conf := sarama.NewConfig()
	admin, err := sarama.NewClusterAdmin(b.addrs, conf)
	if err != nil {
		t.Log(err)
		return
	}
	defer admin.Close()
	for _, name := range names {
		if err := admin.DeleteTopic(name); err != nil {
			t.Logf("delete topic %s: %v", name, err)
		}
	}
}
