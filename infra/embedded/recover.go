package embedded

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// kfake writes some of what it knows only when it is closed. After a kill it can find out the end of every partition
// from the log again, but it reads the whole log into memory for that, and it forgets which batches of an idempotent
// producer it has got already, so that a batch sent again would be in the log twice. recoverLog makes good for both:
// it reads the headers of all batches and writes down what an orderly end would have written.
//
// The files are those of kfake's version 1 of the format, see its persist.go.

const (
	formatVersion = 1
	headerBytes   = 61 // of a record batch, up to its records
	windowSize    = 5  // batches of a producer and partition that can be told from new ones
	transactional = 0x10
)

type (
	snapshot struct {
		Version          int       `json:"version"`
		HighWatermark    int64     `json:"high_watermark"`
		LastStableOffset int64     `json:"last_stable_offset"`
		LogStartOffset   int64     `json:"log_start_offset"`
		Epoch            int32     `json:"epoch"`
		LeaderNode       int32     `json:"leader_node,omitempty"`
		MaxTimestamp     int64     `json:"max_timestamp"`
		CreatedAt        time.Time `json:"created_at"`
		Segments         []segment `json:"segments"`
	}
	segment struct {
		BaseOffset int64 `json:"base_offset"`
		Size       int64 `json:"size"`
	}

	sequences struct {
		Version int      `json:"version"`
		Windows []window `json:"windows"`
	}
	// window is the last batches of a producer in a partition: the first Count of Entries, the next one goes to At.
	window struct {
		Producer  int64             `json:"pid"`
		Topic     string            `json:"topic"`
		Partition int32             `json:"partition"`
		Entries   [windowSize]entry `json:"entries"`
		Count     int               `json:"count"`
		At        int               `json:"at"`
		Epoch     int16             `json:"epoch"`
		Seen      bool              `json:"seen"`
		NextSeq   int32             `json:"next_seq"`
	}
	entry struct {
		FirstSeq int32 `json:"first_seq"`
		NextSeq  int32 `json:"next_seq"`
		Offset   int64 `json:"offset"`
	}
)

func recoverLog(ctx context.Context, dir string, log *slog.Logger) error {
	began := time.Now()
	partitions := filepath.Join(dir, "partitions")
	dirs, err := os.ReadDir(partitions)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	all := sequences{Version: formatVersion}
	for _, d := range dirs {
		if err := ctx.Err(); err != nil {
			return err
		}
		topic, partition, ok := partitionOf(d.Name())
		if !ok {
			continue
		}
		windows, err := recoverPartition(filepath.Join(partitions, d.Name()))
		if err != nil {
			return fmt.Errorf("partition %s: %w", d.Name(), err)
		}
		for _, w := range windows {
			w.Topic, w.Partition = topic, partition
			all.Windows = append(all.Windows, *w)
		}
	}
	if err := writeJSON(filepath.Join(dir, "seq_windows.json"), all); err != nil {
		return err
	}
	log.Info("the broker was killed; its log is recovered", "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// partitionOf reads the name of a partition's directory.
func partitionOf(name string) (topic string, partition int32, ok bool) {
	i := strings.LastIndexByte(name, '-')
	if i < 0 {
		return "", 0, false
	}
	topic, err1 := url.PathUnescape(name[:i])
	n, err2 := strconv.ParseInt(name[i+1:], 10, 32)
	return topic, int32(n), err1 == nil && err2 == nil
}

func recoverPartition(dir string) (map[int64]*window, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.dat"))
	if err != nil {
		return nil, err
	}
	var bases []int64
	for _, f := range files {
		base, err := strconv.ParseInt(strings.TrimSuffix(filepath.Base(f), ".dat"), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s is not a segment: %w", f, err)
		}
		bases = append(bases, base)
	}
	slices.Sort(bases)

	path := filepath.Join(dir, "snapshot.json")
	var s snapshot // an old one still knows what was deleted
	if err := readJSON(path, &s); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if s.Version == 0 {
		s = snapshot{Version: formatVersion, CreatedAt: time.Now()}
		if len(bases) > 0 {
			s.LogStartOffset = bases[0]
		}
	}
	s.HighWatermark, s.Segments = s.LogStartOffset, nil
	windows := map[int64]*window{}
	transactions := false
	for _, base := range bases {
		size, err := eachBatch(filepath.Join(dir, fmt.Sprintf("%d.dat", base)), func(b batch) {
			s.HighWatermark = max(s.HighWatermark, b.offset+int64(b.lastDelta)+1)
			s.MaxTimestamp = max(s.MaxTimestamp, b.maxTimestamp)
			transactions = transactions || b.attributes&transactional != 0
			if b.producer >= 0 {
				if windows[b.producer] == nil {
					windows[b.producer] = &window{Producer: b.producer}
				}
				windows[b.producer].push(b)
			}
		})
		if err != nil {
			return nil, err
		}
		s.Segments = append(s.Segments, segment{BaseOffset: base, Size: size})
	}
	if transactions {
		return windows, removeIfThere(path) // which of them are open only kfake finds out, in its slower way
	}
	s.LastStableOffset = s.HighWatermark
	return windows, writeJSON(path, s)
}

func (w *window) push(b batch) {
	if !w.Seen || w.Epoch != b.epoch {
		*w = window{Producer: b.producer, Epoch: b.epoch, Seen: true}
	}
	w.NextSeq = int32((int64(b.sequence) + int64(b.records)) % (1<<31 - 1))
	w.Entries[w.At] = entry{FirstSeq: b.sequence, NextSeq: w.NextSeq, Offset: b.offset}
	w.At = (w.At + 1) % windowSize
	w.Count = min(w.Count+1, windowSize)
}

// batch is the header of a record batch, as far as it matters here.
type batch struct {
	offset       int64
	attributes   uint16
	lastDelta    int32
	maxTimestamp int64
	producer     int64
	epoch        int16
	sequence     int32
	records      int32
}

// eachBatch calls f with every batch of the segment, in order. What a kill has torn at the end is cut off, for it was
// never acknowledged. The result is the size that is left.
func eachBatch(path string, f func(batch)) (size int64, err error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return 0, err
	}
	in := bufio.NewReaderSize(file, 1<<16)
	header := make([]byte, headerBytes)
	for {
		if _, err := io.ReadFull(in, header); err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return 0, err
			}
			break
		}
		length := 12 + int64(int32(binary.BigEndian.Uint32(header[8:])))
		if length < headerBytes || size+length > info.Size() {
			break
		}
		if _, err := in.Discard(int(length - headerBytes)); err != nil {
			return 0, err
		}
		size += length
		f(batch{
			offset:       int64(binary.BigEndian.Uint64(header)),
			attributes:   binary.BigEndian.Uint16(header[21:]),
			lastDelta:    int32(binary.BigEndian.Uint32(header[23:])),
			maxTimestamp: int64(binary.BigEndian.Uint64(header[35:])),
			producer:     int64(binary.BigEndian.Uint64(header[43:])),
			epoch:        int16(binary.BigEndian.Uint16(header[51:])),
			sequence:     int32(binary.BigEndian.Uint32(header[53:])),
			records:      int32(binary.BigEndian.Uint32(header[57:])),
		})
	}
	if size < info.Size() {
		return size, file.Truncate(size)
	}
	return size, nil
}
