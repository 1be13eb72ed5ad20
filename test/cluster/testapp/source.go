package main

import (
	"encoding/hex"
	"hash"
	"io"
	"sync"
	"time"
)

// source is a request's body: a pattern of so many bytes, at a rate.
type source struct {
	rate  int64 // bytes per second; 0: no bound
	begun time.Time
	end   func(sum string) // called once, when all was read; may be nil
	over  chan struct{}    // closed then

	mu   sync.Mutex // the transport reads while the client counts
	left int64
	sent int64
	last time.Time // when all was read
	from pattern
	sum  hash.Hash
}

func (s *source) Read(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left == 0 {
		if s.last.IsZero() {
			s.last = time.Now()
			if s.end != nil {
				s.end(hex.EncodeToString(s.sum.Sum(nil)))
			}
			close(s.over)
		}
		return 0, io.EOF
	}
	if s.rate > 0 {
		due := time.Duration(float64(s.sent) / float64(s.rate) * float64(time.Second))
		time.Sleep(time.Until(s.begun.Add(due)))
		b = b[:min(int64(len(b)), max(1, s.rate/50))]
	}
	b = b[:min(int64(len(b)), s.left)]
	n, _ := s.from.Read(b)
	s.sum.Write(b[:n])
	s.left -= int64(n)
	s.sent += int64(n)
	return n, nil
}

func (s *source) Close() error { return nil }

// state is how much was read so far, its checksum, and when that was all.
func (s *source) state() (sent int64, sum string, last time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent, hex.EncodeToString(s.sum.Sum(nil)), s.last
}
