-- the tables that the questions of sql.jsonl are about; the rows are made up
CREATE TABLE departments (id INTEGER PRIMARY KEY, name TEXT);
INSERT INTO departments VALUES (1, 'sales'), (2, 'stores'), (3, 'repairs');
CREATE TABLE suppliers (id INTEGER PRIMARY KEY, name TEXT);
INSERT INTO suppliers VALUES (1, 'Nord'), (2, 'Sud'), (3, 'West');
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, age INTEGER, visits INTEGER, city TEXT, status TEXT);
INSERT INTO customers VALUES
    (1, 'Ada', 43, 24, 'Oslo', 'new'),
    (2, 'Bo', 32, 15, 'Oslo', 'new'),
    (3, 'Cleo', 34, 24, 'Graz', 'new'),
    (4, 'Dan', 78, 39, 'Lyon', 'new'),
    (5, 'Eva', 44, 39, 'Graz', 'new'),
    (6, 'Finn', 68, 23, 'Lyon', 'new'),
    (7, 'Gil', 27, 29, 'Graz', 'new'),
    (8, 'Hana', 72, 36, 'Lyon', 'new'),
    (9, 'Ivo', 78, 33, 'Graz', 'new'),
    (10, 'Jana', 48, 20, 'Lyon', 'new'),
    (11, 'Kim', 35, 35, 'Oslo', 'gold'),
    (12, 'Lars', 31, 23, 'Graz', 'new'),
    (13, 'Mia', 47, 33, 'Oslo', 'gold'),
    (14, 'Ned', 80, 3, 'Lyon', 'new'),
    (15, 'Oda', 31, 10, 'Graz', 'gold'),
    (16, 'Pia', 56, 11, 'Graz', 'new');
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, price INTEGER, stock INTEGER, category TEXT, supplier_id INTEGER);
INSERT INTO products VALUES
    (1, 'atlas', 38, 56, 'books', 1),
    (2, 'ball', 486, 350, 'food', 1),
    (3, 'bread', 436, 323, 'books', 1),
    (4, 'chisel', 318, 316, 'books', 2),
    (5, 'doll', 338, 69, 'food', 1),
    (6, 'drill', 807, 498, 'books', 3),
    (7, 'honey', 217, 226, 'toys', 3),
    (8, 'kite', 414, 422, 'tools', 2),
    (9, 'map', 712, 243, 'books', 1),
    (10, 'novel', 757, 442, 'tools', 3),
    (11, 'olives', 419, 63, 'books', 1),
    (12, 'puzzle', 148, 151, 'tools', 1),
    (13, 'rice', 420, 74, 'tools', 3),
    (14, 'saw', 327, 394, 'food', 1),
    (15, 'tea', 867, 131, 'books', 2),
    (16, 'vise', 191, 347, 'books', 3);
CREATE TABLE employees (id INTEGER PRIMARY KEY, name TEXT, salary INTEGER, age INTEGER, role TEXT, department_id INTEGER);
INSERT INTO employees VALUES
    (1, 'Abel', 3356, 20, 'manager', 1),
    (2, 'Bea', 3764, 33, 'clerk', 2),
    (3, 'Cem', 3758, 45, 'clerk', 2),
    (4, 'Dora', 7665, 43, 'manager', 1),
    (5, 'Emil', 2484, 22, 'clerk', 3),
    (6, 'Fay', 8021, 45, 'clerk', 1),
    (7, 'Gus', 3551, 61, 'engineer', 3),
    (8, 'Hedy', 6897, 39, 'engineer', 3),
    (9, 'Ian', 6904, 40, 'engineer', 3),
    (10, 'Joy', 6523, 65, 'engineer', 2),
    (11, 'Kurt', 3427, 48, 'engineer', 2),
    (12, 'Lia', 4449, 36, 'engineer', 3),
    (13, 'Max', 3400, 63, 'clerk', 2),
    (14, 'Nora', 5368, 28, 'clerk', 2),
    (15, 'Otto', 8221, 38, 'clerk', 3),
    (16, 'Paul', 7769, 59, 'engineer', 2);
