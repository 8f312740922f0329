package journaltest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"wharf/infra/journal"
)

// Topics makes two empty topics with that many partitions.
type Topics func(t testing.TB, partitions int) (journal.Log, journal.PublicLog)

// Run runs the whole suite.
func Run(t *testing.T, topics Topics) {
	t.Run("log", func(t *testing.T) { runLog(t, topics) })
	t.Run("protocol", func(t *testing.T) { runProtocol(t, topics) })
}

func runLog(t *testing.T, topics Topics) {
	t.Run("records are read back in order, as they were", func(t *testing.T) {
		log, _ := topics(t, 2)
		want := journal.Record{Partition: 1, Key: []byte("k"), Value: []byte("v"), Headers: []journal.Header{
			{Key: "a", Value: []byte("1")}, {Key: "b", Value: nil}, {Key: "a", Value: []byte("2")},
		}}
		for range 3 {
			must(t, log.Append(t.Context(), want))
		}
		got := read(t, log, 1, 0, 3)
		for i, r := range got {
			if r.Partition != 1 || string(r.Key) != "k" || string(r.Value) != "v" || r.Time.IsZero() ||
				fmt.Sprintf("%q", r.Headers) != fmt.Sprintf("%q", want.Headers) || i > 0 && r.Offset <= got[i-1].Offset {
				t.Errorf("record %d is read as %+v", i, r)
			}
		}
		if end, err := log.End(t.Context(), 0); end != 0 || err != nil {
			t.Errorf("the other partition ends at %d: %v", end, err)
		}
	})

	t.Run("a reader follows the log, from where it is told to", func(t *testing.T) {
		log, _ := topics(t, 1)
		must(t, log.Append(t.Context(), journal.Record{Key: []byte("k"), Value: []byte("0")}))
		from, err := log.End(t.Context(), 0)
		must(t, err)
		go func() {
			for i := range 5 {
				_ = log.Append(context.WithoutCancel(t.Context()), journal.Record{Key: []byte("k"), Value: fmt.Append(nil, i+1)})
			}
		}()
		for i, r := range read(t, log, 0, from, 5) {
			if string(r.Value) != fmt.Sprint(i+1) {
				t.Errorf("record %d holds %s", i, r.Value)
			}
		}
	})

	t.Run("Next passes the end", func(t *testing.T) {
		log, _ := topics(t, 1)
		must(t, log.Append(t.Context(), journal.Record{Key: []byte("k")}))
		end, err := log.End(t.Context(), 0)
		must(t, err)
		done := errors.New("done")
		err = log.Read(t.Context(), 0, 0, func(b journal.Batch) error {
			if b.Next >= end {
				return done
			}
			return nil
		})
		if !errors.Is(err, done) {
			t.Error(err)
		}
	})

	t.Run("an offset that is not there is an error", func(t *testing.T) {
		log, _ := topics(t, 1)
		must(t, log.Append(t.Context(), journal.Record{Key: []byte("k")}))
		ctx, cancel := context.WithTimeout(t.Context(), Patience)
		defer cancel()
		err := log.Read(ctx, 0, 7, func(journal.Batch) error { return errors.New("read") })
		if err == nil || ctx.Err() != nil || err.Error() == "read" {
			t.Errorf("reading from offset 7 of 1: %v", err)
		}
	})

	t.Run("reading ends with its context", func(t *testing.T) {
		log, _ := topics(t, 1)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- log.Read(ctx, 0, 0, func(journal.Batch) error { return nil }) }()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})

	t.Run("appends at the same time are all there", func(t *testing.T) {
		log, _ := topics(t, 2)
		const n = 200
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				if err := log.Append(t.Context(), journal.Record{Partition: 1, Key: []byte("k"), Value: fmt.Append(nil, i)}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		seen := map[string]int{}
		for _, r := range read(t, log, 1, 0, n) {
			seen[string(r.Value)]++
		}
		if len(seen) != n {
			t.Errorf("%d of %d records are there", len(seen), n)
		}
	})

	t.Run("a batch is next to each other and in order", func(t *testing.T) {
		_, public := topics(t, 1)
		const batches, size = 20, 30
		var wg sync.WaitGroup
		for b := range batches {
			wg.Go(func() {
				records := make([]journal.Record, size)
				for i := range records {
					records[i] = journal.Record{Key: []byte("k"), Value: fmt.Appendf(nil, "%d %d", b, i)}
				}
				if err := public.AppendBatch(t.Context(), 0, records); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for batch := range slices.Chunk(read(t, public, 0, 0, batches*size), size) {
			var b, i, first int
			for at, r := range batch {
				_, _ = fmt.Sscanf(string(r.Value), "%d %d", &b, &i)
				if at == 0 {
					first = b
				}
				if b != first || i != at {
					t.Fatalf("batch %d has record %d of batch %d at %d", first, i, b, at)
				}
			}
		}
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// read reads the first n records from the offset on.
func read(t testing.TB, r journal.Reader, partition int32, from int64, n int) (records []journal.Record) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	done := errors.New("done")
	err := r.Read(ctx, partition, from, func(b journal.Batch) error {
		if records = append(records, b.Records...); len(records) >= n {
			return done
		}
		return nil
	})
	if !errors.Is(err, done) || len(records) != n {
		t.Fatalf("%d of %d records: %v", len(records), n, err)
	}
	return records
}
