package api

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
)

// lineReader takes lines of newline-delimited JSON off a stream.
type lineReader struct{ scan *bufio.Scanner }

func newLineReader(r io.Reader) *lineReader {
	scan := bufio.NewScanner(r)
	scan.Buffer(make([]byte, 0, 64<<10), maxAnswer)
	return &lineReader{scan}
}

// next returns the next line; io.EOF at the end of the stream.
func (r *lineReader) next() (l Line, err error) {
	for r.scan.Scan() {
		if len(r.scan.Bytes()) == 0 {
			continue
		}
		if err := json.Unmarshal(r.scan.Bytes(), &l); err != nil {
			return l, fmt.Errorf("decoding a line: %w", err)
		}
		return l, nil
	}
	if err := r.scan.Err(); err != nil {
		return l, err
	}
	return l, io.EOF
}
