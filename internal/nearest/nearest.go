// Package nearest finds the word that somebody may have meant who mistyped one:
// a flag, a command, a Service.
package nearest

import "strings"

// Of is the known word with the fewest edits from word, or "" when none is near
// enough to be meant.
func Of(word string, known []string) string {
	best, bestDistance := "", len(word)/3+2
	for _, k := range known {
		d := distance(word, k)
		if strings.HasPrefix(k, word) && len(word) > 2 {
			d = 1
		}
		if d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// distance is the number of letters to insert, remove or replace to make b of a
// (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			above := row[j]
			replace := diagonal
			if a[i-1] != b[j-1] {
				replace++
			}
			row[j] = min(above+1, row[j-1]+1, replace)
			diagonal = above
		}
	}
	return row[len(b)]
}
