package kafka

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	"wharf/infra/journal"
)

var (
	_ journal.Log       = (*Log)(nil)
	_ journal.PublicLog = (*PublicLog)(nil)
)

func header(key, value string) journal.Header { return journal.Header{Key: key, Value: []byte(value)} }

// What was appended is read: key, value and headers in their order, repeated names and all.
func TestRecordsAreReadAsTheyWereAppended(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 3)
	records := []journal.Record{
		{Key: []byte("a"), Value: []byte("v"), Headers: []journal.Header{
			header("wharf-format", "1"), header(commitHeader, uuid.NewString()), header("wharf-parent", ""),
			header("x", "2"), header("x", "1")}},
		{Key: []byte("b"), Value: []byte{0, 255}},
		{Value: []byte("no key"), Headers: []journal.Header{header("y", "")}},
		{Key: []byte("no value")},
		{Key: []byte("c"), Value: []byte("own uuid"), Headers: []journal.Header{header(uuidHeader, "u"), header("z", "1")}},
	}
	for i := range records {
		records[i].Partition = 2
		if err := c.Log(name).Append(t.Context(), records[i]); err != nil {
			t.Fatal(err)
		}
	}
	appendAll(t, c.PublicLog(name), 2, records)
	got := readTo(t, c.Reader(name), 2, 0, int64(2*len(records)))
	for i := range got {
		if since := time.Since(got[i].Time); since < -time.Minute || since > time.Minute {
			t.Errorf("record %d has time %v", i, got[i].Time)
		}
		got[i].Offset, got[i].Time = 0, time.Time{}
		if len(got[i].Headers) == 0 {
			got[i].Headers = nil
		}
	}
	if diff := cmp.Diff(append(records, records...), got); diff != "" {
		t.Errorf("(-appended +read)\n%s", diff)
	}
}

func TestAppendOfManyAtOnce(t *testing.T) {
	c := connect(t, brokers(t))
	log := c.Log(topic(t, c, 4))
	var wg sync.WaitGroup
	for p := range int32(4) {
		for _, r := range numbered(p, 0, 250) {
			wg.Go(func() {
				if err := log.Append(t.Context(), r); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	for p := range int32(4) {
		seen := map[string]bool{}
		for _, r := range readTo(t, log, p, 0, 250) {
			seen[string(r.Value)] = true
		}
		if len(seen) != 250 {
			t.Errorf("partition %d has %d of 250 records", p, len(seen))
		}
	}
}

func TestAppendBatchEndsWithItsContext(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(1))
	c := connect(t, cluster.ListenAddrs())
	name := topic(t, c, 1)
	free, arrived := make(chan struct{}), make(chan struct{}, 10)
	cluster.ControlKey(int16(kmsg.Produce), func(kmsg.Request) (kmsg.Response, error, bool) {
		arrived <- struct{}{}
		cluster.SleepControl(func() { <-free })
		return nil, nil, false
	})
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error)
	go func() { got <- c.PublicLog(name).AppendBatch(ctx, 0, numbered(0, 0, 1)) }()
	<-arrived
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) || errors.Is(err, journal.ErrRefused) {
		t.Errorf("got %v, want context.Canceled", err)
	}
	close(free)
	wantNumbers(t, readTo(t, c.Reader(name), 0, 0, 1), 0, 1) // it came into the log all the same
}

func TestRefused(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 1)
	largest := journal.Record{Key: make([]byte, 36), Value: make([]byte, MaxRecordBytes-36)}
	if err := c.Log(name).Append(t.Context(), largest); err != nil {
		t.Errorf("a record of MaxRecordBytes: %v", err)
	}
	large := journal.Record{Value: make([]byte, topicMessageBytes)}
	if err := c.Log(name).Append(t.Context(), large); !errors.Is(err, journal.ErrRefused) {
		t.Errorf("Append: got %v, want ErrRefused", err)
	}
	if err := c.PublicLog(name).AppendBatch(t.Context(), 0, []journal.Record{large}); !errors.Is(err, journal.ErrRefused) {
		t.Errorf("AppendBatch: got %v, want ErrRefused", err)
	}
	if end, err := c.Reader(name).End(t.Context(), 0); err != nil || end != 1 {
		t.Errorf("the end is %d, %v, want 1", end, err)
	}
}

// The errors of a broker: which ones are final, and which of the others AppendBatch may try again by itself.
func TestProduceErrors(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(1))
	c := connect(t, cluster.ListenAddrs())
	name := topic(t, c, 1)
	end := int64(0)
	for _, tc := range []struct {
		err     sarama.KError
		refused bool
		again   bool
	}{
		{err: sarama.ErrTopicAuthorizationFailed, refused: true},
		{err: sarama.ErrClusterAuthorizationFailed, refused: true},
		{err: sarama.ErrMessageSizeTooLarge, refused: true},
		{err: sarama.ErrRequestTimedOut},
		{err: sarama.ErrNotEnoughReplicasAfterAppend},
		{err: sarama.ErrNotLeaderForPartition, again: true},
		{err: sarama.ErrNotEnoughReplicas, again: true},
	} {
		t.Run(tc.err.Error(), func(t *testing.T) {
			fail := func() {
				cluster.ControlKey(int16(kmsg.Produce), func(req kmsg.Request) (kmsg.Response, error, bool) {
					resp := req.ResponseKind().(*kmsg.ProduceResponse)
					rt := kmsg.NewProduceResponseTopic()
					rt.Topic = name
					rp := kmsg.NewProduceResponseTopicPartition()
					rp.ErrorCode = int16(tc.err)
					rt.Partitions = append(rt.Partitions, rp)
					resp.Topics = append(resp.Topics, rt)
					return resp, nil, true
				})
			}
			fail()
			err := c.PublicLog(name).AppendBatch(t.Context(), 0, numbered(0, 0, 1))
			if tc.again {
				end++
			}
			if (err == nil) != tc.again || errors.Is(err, journal.ErrRefused) != tc.refused {
				t.Errorf("AppendBatch: got %v", err)
			}
			if now, err := c.Reader(name).End(t.Context(), 0); err != nil || now != end {
				t.Errorf("the end is %d, %v, want %d", now, err, end)
			}
			if tc.refused {
				fail()
				if err := c.Log(name).Append(t.Context(), numbered(0, 0, 1)[0]); !errors.Is(err, journal.ErrRefused) {
					t.Errorf("Append: got %v, want ErrRefused", err)
				}
			}
		})
	}
}

// Batches of several writers never mingle, and lie in the log as one each.
func TestAppendBatchIsAtomic(t *testing.T) {
	c := connect(t, brokers(t))
	log := c.PublicLog(topic(t, c, 1))
	const writers, batches, n = 8, 10, 20
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for b := range batches {
				records := numbered(0, 0, n)
				for i := range records {
					records[i].Value = fmt.Appendf(nil, "%d/%d/%d", w, b, i)
				}
				if err := log.AppendBatch(t.Context(), 0, records); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got := readTo(t, log, 0, 0, writers*batches*n)
	for i := 0; i+n <= len(got); i += n {
		var w, b, first int
		fmt.Sscanf(string(got[i].Value), "%d/%d/%d", &w, &b, &first)
		for j := range n {
			if want := fmt.Sprintf("%d/%d/%d", w, b, j); string(got[i+j].Value) != want {
				t.Fatalf("offset %d holds %s, want %s", i+j, got[i+j].Value, want)
			}
		}
	}
}

func TestAppendBatchTakesTheEventsTime(t *testing.T) {
	c := connect(t, brokers(t))
	log := c.PublicLog(topic(t, c, 1))
	at := time.Date(2024, 5, 6, 7, 8, 9, 123e6, time.UTC)
	records := numbered(0, 0, 3)
	records[0].Headers = []journal.Header{header(timeHeader, time.Now().Add(48*time.Hour).Format(time.RFC3339Nano))}
	records[1].Headers = []journal.Header{header(timeHeader, at.Format(time.RFC3339Nano))}
	records[2].Headers = []journal.Header{header(timeHeader, "nonsense")}
	appendAll(t, log, 0, records)
	got := readTo(t, log, 0, 0, 3)
	for _, i := range []int{0, 2} {
		if since := time.Since(got[i].Time); since < -time.Minute || since > time.Minute {
			t.Errorf("record %d has time %v, want now", i, got[i].Time)
		}
	}
	if !got[1].Time.Equal(at) {
		t.Errorf("got time %v, want %v", got[1].Time, at)
	}
}
