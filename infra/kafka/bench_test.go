package kafka

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	"wharf/infra/journal"
)

// BenchmarkAppend is how fast many goroutines append, one record at a time each, while all partitions are read.
func BenchmarkAppend(b *testing.B) {
	for _, workers := range []int{1, 64, 2048} {
		b.Run(fmt.Sprint(workers), func(b *testing.B) {
			c := connect(b, brokers(b))
			log := c.Log(topic(b, c, 12))
			value := make([]byte, 500)
			ctx, cancel := context.WithCancel(b.Context())
			var reads, appends sync.WaitGroup
			var mu sync.Mutex
			got := 0
			all := make(chan struct{})
			for p := range int32(12) {
				reads.Go(func() {
					_ = log.Read(ctx, p, 0, func(batch journal.Batch) error {
						mu.Lock()
						defer mu.Unlock()
						if got += len(batch.Records); got == b.N {
							close(all)
						}
						return nil
					})
				})
			}
			b.ResetTimer()
			work := make(chan int)
			for range workers {
				appends.Go(func() {
					for i := range work {
						r := journal.Record{Partition: int32(i % 12), Key: []byte("0123456789abcdef0123456789abcdef"), Value: value,
							Headers: []journal.Header{{Key: "wharf-format", Value: []byte("1")}, {Key: commitHeader, Value: []byte("x")}}}
						if err := log.Append(ctx, r); err != nil {
							b.Error(err)
						}
					}
				})
			}
			for i := range b.N {
				work <- i
			}
			close(work)
			appends.Wait()
			<-all
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
			cancel()
			reads.Wait()
		})
	}
}

// BenchmarkLatency is the time from an append until a reader has the record, with all partitions read and one written.
func BenchmarkLatency(b *testing.B) {
	c := connect(b, brokers(b))
	log := c.Log(topic(b, c, 12))
	ctx, cancel := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	got := make(chan time.Time)
	for p := range int32(12) {
		wg.Go(func() {
			_ = log.Read(ctx, p, 0, func(batch journal.Batch) error {
				for range batch.Records {
					got <- time.Now()
				}
				return nil
			})
		})
	}
	var times, ends []time.Duration
	b.ResetTimer()
	for i := range b.N {
		start := time.Now()
		if err := log.Append(ctx, journal.Record{Partition: int32(i % 12), Value: []byte("x")}); err != nil {
			b.Fatal(err)
		}
		times = append(times, (<-got).Sub(start))
		start = time.Now()
		if _, err := log.End(ctx, int32(i%12)); err != nil {
			b.Fatal(err)
		}
		ends = append(ends, time.Since(start))
	}
	b.StopTimer()
	slices.Sort(times)
	slices.Sort(ends)
	b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-µs")
	b.ReportMetric(float64(ends[len(ends)/2].Microseconds()), "end-p50-µs")
	cancel()
	wg.Wait()
}

// BenchmarkSubscriber is how fast records are handed out and acked, each target's in order.
func BenchmarkSubscriber(b *testing.B) {
	c := connect(b, brokers(b))
	name := topic(b, c, 12)
	log := c.PublicLog(name)
	for i := 0; i < b.N; i += 500 {
		rs := numbered(int32(i/500%12), i, min(500, b.N-i))
		for j := range rs {
			rs[j].Value = make([]byte, 500)
			rs[j].Headers = []journal.Header{header("ce_id", fmt.Sprint(i+j)), header("ce_type", "order.placed.v1")}
		}
		appendAll(b, log, int32(i/500%12), rs)
	}
	b.ResetTimer()
	sub := NewSubscriber(c, SubscriberConfig{Group: name, Targets: func(msg *message.Message) ([]string, error) {
		return []string{msg.UUID[:min(len(msg.UUID), 2)]}, nil
	}})
	msgs, err := sub.Subscribe(b.Context(), name)
	if err != nil {
		b.Fatal(err)
	}
	for range b.N {
		msg := <-msgs
		go msg.Ack()
	}
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
	_ = sub.Close()
}
